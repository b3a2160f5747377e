"""Calibration: quantized weights that make a model's answers suffer least, found with what the model is given to read.

A file per matter: ``calibrate.py`` is the whole way, ``data.py`` says on what, ``sample.py`` lets the model write that
itself, ``branches.py`` leads it through the layers, ``gptq.py`` rounds, ``work_folder.py`` remembers.
"""

from mvlm.export.calibrate.calibrate import CalibrationOptions, CalibrationResult, calibrate, work_folder

__all__ = ["CalibrationOptions", "CalibrationResult", "calibrate", "work_folder"]
