"""Trains the demo checkpoint: ``python -m mvlm.export.demo.train --help``.

Reruns on two CPU cores in about an hour. The state is saved every few minutes, and on Ctrl-C; the same command with
--resume goes on where it was. If the machine has other work too, set OMP_WAIT_POLICY=passive in the environment, or
threads that wait for each other take its cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from mvlm.export.demo import world
from mvlm.export.demo.data import PromptTokens, TrainingPictures, make_batch, normalized, quadrant_labels, resized
from mvlm.export.demo.evaluate import evaluate_checkpoint, table
from mvlm.export.demo.network import ImageReader, answer_logits, build, demo_config
from mvlm.export.demo.tokenizer import train_tokenizer
from mvlm.export.demo.write_checkpoint import write_checkpoint
from mvlm.export.models import MobileVLM, MobileVLMConfig


@dataclass(frozen=True)
class Recipe:
    """Everything that the trained weights depend on.

    Attributes:
        seed: of the first weights and of all pictures and questions.
        steps: optimizer steps.
        batch: pictures a step.
        vision_steps: so many of the steps, at the start, train vision tower and projector only, to show what is in
            each quadrant, on ``vision_batch`` pictures each.
        quadrant_weight: of that loss beside the answers' once the language model has joined.
        second_look: from this step on, the loss of the quadrants weighs ``second_weight``, and as many pictures
            again are looked at for it alone. By then what the eyes take for another shape is most of what is wrong.
        place_from: from this step on, each image token also has to tell its place in the picture, with a loss of
            weight ``place_weight``.
        learning_rate: reached after ``warmup`` steps, held, and lowered to ``final_learning_rate`` along a cosine
            over the last ``decay`` part of the steps. What happens before the decay does not depend on ``steps``.
            It is warmed up again when the language model joins.
        weight_decay: of matrices.
        pool, renewed: pictures held at a time, and new ones a step.
        fake_quant: part of the steps, at the end, in which the language model's linears compute with weights rounded
            to 4 bits as in deployment; the gradient passes straight through. 0 for none.
        group_size: weights that share a scale in that rounding; halved until it divides a linear's width.
    """

    seed: int = 1
    steps: int = 3400
    batch: int = 16
    vision_steps: int = 600
    vision_batch: int = 32
    quadrant_weight: float = 0.2
    second_look: int = 1400
    second_weight: float = 1.0
    place_from: int = 1800
    place_weight: float = 0.3
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup: int = 100
    decay: float = 0.35
    weight_decay: float = 0.05
    pool: int = 2048
    renewed: int = 8
    fake_quant: float = 0.2
    group_size: int = 128

    def learning_rate_at(self, step: int) -> float:
        start = round(self.steps * (1 - self.decay))
        if step < start:
            since = step - self.vision_steps if step >= self.vision_steps else step
            return self.learning_rate * min(1.0, (since + 1) / self.warmup)
        progress = (step - start) / max(1, self.steps - start)
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))

    def quantizes_at(self, step: int) -> bool:
        return step >= round(self.steps * (1 - self.fake_quant))


def rounded_to_4_bits(weight: Tensor, group_size: int) -> Tensor:
    """``weight`` [out, in] as 4-bit integers times a scale for every group along the input, as in deployment."""
    while weight.shape[1] % group_size:
        group_size //= 2
    groups = weight.view(weight.shape[0], -1, group_size)
    # 4 bits hold -8 .. 7, and 7.5 is half that range; XNNPACK keeps the scales as bfloat16.
    scale = (groups.abs().amax(dim=2, keepdim=True) / 7.5).clamp_min(1e-7).bfloat16().float()
    return ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight)


@contextmanager
def rounded_linears(model: MobileVLM, group_size: int) -> Iterator[None]:
    """Inside, the language model's linears compute with weights of 4 bits.

    Gradients that are computed inside are those of the true weights afterwards ("straight through"). The token
    embedding stays as it is, though lm_head shares its weight.
    """
    language = model.language_model
    linears = [m for m in language.layers.modules() if isinstance(m, nn.Linear)]
    true_weights = [linear.weight.data for linear in linears]
    tied = language.lm_head.weight
    for linear in linears:
        linear.weight.data = rounded_to_4_bits(linear.weight.data, group_size)
    language.lm_head.weight = nn.Parameter(rounded_to_4_bits(tied.data, group_size))
    try:
        yield
    finally:
        for linear, weight in zip(linears, true_weights, strict=True):
            linear.weight.data = weight
        gradient = language.lm_head.weight.grad
        language.lm_head.weight = tied
        if gradient is not None:
            tied.grad = gradient if tied.grad is None else tied.grad + gradient


def make_optimizer(model: MobileVLM, reader: ImageReader, recipe: Recipe) -> torch.optim.AdamW:
    parameters = list(dict.fromkeys([*model.parameters(), *reader.parameters()]))
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )


class Trainer:
    """A model, its optimizer, and the step it is at."""

    def __init__(self, recipe: Recipe, tokenizer_model: bytes, config: MobileVLMConfig | None = None) -> None:
        self.recipe = recipe
        self.tokenizer_model = tokenizer_model
        self.tokens = PromptTokens(tokenizer_model)
        self.config = config or demo_config(self.tokens.processor.vocab_size())
        self.model = build(self.config, recipe.seed)
        self.reader = ImageReader(self.config.text.hidden_size, self.config.num_image_tokens)
        self.optimizer = make_optimizer(self.model, self.reader, recipe)
        pool = max(recipe.pool, recipe.batch, recipe.vision_batch)
        self.pictures = TrainingPictures(recipe.seed, self.config.vision.image_size, recipe.batch, pool, recipe.renewed)
        self.step = 0
        self.seconds = 0.0

    @classmethod
    def from_state(cls, path: Path) -> Trainer:
        """The trainer that saved a state."""
        state = torch.load(path, weights_only=True)
        trainer = cls(Recipe(**state["recipe"]), state["tokenizer"])
        trainer.load(path)
        return trainer

    def train_step(self) -> float:
        """One step; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        if self.step < self.recipe.vision_steps:
            batch = self.pictures.batch_at(self.step, self.tokens, self.recipe.vision_batch, asking=False)
            loss = self.reader.quadrant_loss(self.model.encode_image(batch.pixels), batch)
            loss.backward()
        else:
            batch = self.pictures.batch_at(self.step, self.tokens)
            with self.forward_weights():
                image = self.model.encode_image(batch.pixels)
                logits, targets = answer_logits(self.model, self.tokens.prefix, batch, image)
                loss = nn.functional.cross_entropy(logits, targets)
                quadrant_loss, weight = self.reader.quadrant_loss(image, batch), self.recipe.quadrant_weight
                if self.step >= self.recipe.second_look:
                    more = self.pictures.batch_at(self.step, self.tokens, asking=False)
                    second_loss = self.reader.quadrant_loss(self.model.encode_image(more.pixels), more)
                    quadrant_loss, weight = (quadrant_loss + second_loss) / 2, self.recipe.second_weight
                total = loss + weight * quadrant_loss
                if self.step >= self.recipe.place_from:
                    total = total + self.recipe.place_weight * self.reader.place_loss(image)
                total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def forward_weights(self) -> AbstractContextManager[None]:
        """Inside, the model computes with the weights that this step of the recipe asks for."""
        if self.recipe.quantizes_at(self.step):
            return rounded_linears(self.model, self.recipe.group_size)
        return nullcontext()

    def save(self, path: Path) -> None:
        """Writes the whole state; the file appears whole or not at all."""
        state = {
            "recipe": asdict(self.recipe),
            "tokenizer": self.tokenizer_model,
            "model": self.model.state_dict(),
            "reader": self.reader.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Takes up a state that :meth:`save` wrote.

        Raises:
            ValueError: the state is of another recipe.
        """
        state = torch.load(path, weights_only=True)
        free = {"steps", "decay", "fake_quant"}  # these only say what is still to come
        different = [
            f"{field.name} {state['recipe'][field.name]} there, {getattr(self.recipe, field.name)} here"
            for field in fields(Recipe)
            if field.name not in free and state["recipe"][field.name] != getattr(self.recipe, field.name)
        ]
        if different or state["tokenizer"] != self.tokenizer_model:
            raise ValueError(
                f"{path} is the state of another training ({'; '.join(different) or 'tokenizer'}); "
                "give the same options, or start anew without --resume"
            )
        self.model.load_state_dict(state["model"])
        self.reader.load_state_dict(state["reader"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


@torch.no_grad()
def quadrant_accuracy(trainer: Trainer, pictures: int, seed: str) -> tuple[float, float]:
    """How often shape and colour of an object are read off the image tokens, in percent, over fresh pictures."""
    chosen = [world.sample_picture(random.Random(f"{seed}/{index}")) for index in range(pictures)]
    pixels = [resized(picture.image(), trainer.config.vision.image_size) for picture in chosen]
    read = trainer.reader.quadrants(trainer.model.encode_image(normalized(pixels)))
    labels = quadrant_labels([picture.scene for picture in chosen])
    return tuple(
        100 * (logits.argmax(dim=2) == label)[label > 0].float().mean().item()
        for logits, label in zip(read, labels, strict=True)
    )


@torch.no_grad()
def quick_accuracy(trainer: Trainer, pictures: int, seed: str) -> dict[str, tuple[int, int]]:
    """Right answers and questions by kind, over fresh pictures with one question of every kind each.

    An answer is right if every token is the likeliest one given those before it, which is what greedy generation
    would produce.
    """
    right, asked = Counter(), Counter()
    size = trainer.config.vision.image_size
    for start in range(0, pictures, trainer.recipe.batch):
        pictures_here, batch_questions = [], []
        for index in range(start, min(pictures, start + trainer.recipe.batch)):
            rng = random.Random(f"{seed}/{index}")
            picture = world.sample_picture(rng)
            pictures_here.append((picture.scene, resized(picture.image(), size)))
            batch_questions.append([world.sample_question(picture.scene, k, rng) for k in world.KINDS])
        batch = make_batch(trainer.tokens, pictures_here, batch_questions)
        logits, targets = answer_logits(trainer.model, trainer.tokens.prefix, batch)
        wanted = batch.targets >= 0
        rows = torch.arange(len(batch_questions)).unsqueeze(1).expand_as(wanted)[wanted]
        wrong = logits.argmax(dim=1) != targets
        missed = set(zip(rows[wrong].tolist(), batch.segments[wanted][wrong].tolist(), strict=True))
        for row, kinds in enumerate(batch.kinds):
            for segment, kind in enumerate(kinds):
                asked[kind] += 1
                right[kind] += (row, segment) not in missed
    return {kind: (right[kind], asked[kind]) for kind in world.KINDS}


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


class Log:
    """Lines to the terminal and to a file."""

    def __init__(self, path: Path, append: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a" if append else "w", encoding="utf-8")

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


def train(trainer: Trainer, state: Path, log: Log, save_minutes: float = 3, report: int = 50, probe: int = 100) -> bool:
    """Trains to the recipe's last step. Returns False if it was interrupted, after saving the state."""
    recipe = trainer.recipe
    interrupted: list[int] = []
    handlers = {
        number: signal.signal(number, lambda caught, _: interrupted.append(caught))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    last_save = last_time = time.monotonic()
    first_step, start_time, losses = trainer.step, time.monotonic(), []
    try:
        while trainer.step < recipe.steps and not interrupted:
            losses.append(trainer.train_step())
            now = time.monotonic()
            trainer.seconds, last_time = trainer.seconds + now - last_time, now
            if trainer.step % report == 0:
                pace = (now - start_time) / (trainer.step - first_step)
                log(
                    f"step {trainer.step:5d}/{recipe.steps}  loss {sum(losses) / len(losses):.4f}  "
                    f"lr {recipe.learning_rate_at(trainer.step - 1):.1e}  {pace:.2f} s/step  "
                    f"elapsed {_clock(trainer.seconds)}  left {_clock(pace * (recipe.steps - trainer.step))}"
                )
                losses.clear()
            if trainer.step % probe == 0 and trainer.step <= recipe.vision_steps:
                shape, color = quadrant_accuracy(trainer, 96, f"{recipe.seed}/probe/{trainer.step}")
                log(f"  read in the quadrants: shape {shape:.0f} %  color {color:.0f} %")
            elif trainer.step % probe == 0 or trainer.step == recipe.steps:
                with trainer.forward_weights():
                    found = quick_accuracy(trainer, 96, f"{recipe.seed}/probe/{trainer.step}")
                log("  right: " + "  ".join(f"{k} {r}/{n}" for k, (r, n) in found.items()))
            if now - last_save > save_minutes * 60:
                trainer.save(state)
                last_save = now
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    trainer.save(state)
    if interrupted:
        log(f"interrupted at step {trainer.step}; go on with --resume")
    return not interrupted


def finish(trainer: Trainer, output: Path, questions: int, log: Log) -> None:
    """Writes the checkpoint and evaluates what is in the file, weights rounded to float16."""
    folder = output / "checkpoint"
    write_checkpoint(trainer.model, trainer.tokenizer_model, folder)
    result, _ = evaluate_checkpoint(folder, questions, seed=0)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    log(f"{questions} fresh questions, float32 eager:\n{table(result)}")
    shutil.copyfile(log.path, folder / "train.log")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm.export.demo.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/demo"),
        metavar="DIR",
        help="where state.pt, train.log and in the end checkpoint/ go (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--questions", type=int, default=1000, help="asked in the evaluation at the end (default: %(default)s)"
    )
    recipe_options = parser.add_argument_group("recipe", "what the trained weights depend on")
    for field in fields(Recipe):
        recipe_options.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            metavar="N",
            help="(default: %(default)s)",
        )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # AdamW's moments decay into denormals, which are slow and change nothing
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    state = options.output / "state.pt"
    trainer = Trainer(recipe, train_tokenizer())
    if options.resume:
        try:
            trainer.load(state)
        except FileNotFoundError:
            parser.error(f"{state}: no such file; there is nothing to resume, start without --resume")
        except ValueError as error:
            parser.error(str(error))
    log = Log(options.output / "train.log", append=options.resume)
    log(f"resumed at step {trainer.step}" if options.resume else "started")
    log(", ".join(f"{name} {value}" for name, value in asdict(recipe).items()))
    if not train(trainer, state, log):
        return 130
    finish(trainer, options.output, options.questions, log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
