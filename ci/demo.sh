#!/usr/bin/env bash
# Sets everything up, exports the bundled demo checkpoint, and has llava_main answer a question about the bundled picture.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\n== %s\n' "$*" >&2; }

ci/setup.sh
mkdir -p build/demo
if [ -f build/demo/mobilevlm.pte ] &&
   [ -z "$(find export ops pyproject.toml -name __pycache__ -prune -o -type f -newer build/demo/mobilevlm.pte -print)" ]
then
  say "build/demo/mobilevlm.pte is newer than all it is made from: not exporting again"
else
  say "exporting the bundled checkpoint to build/demo/mobilevlm.pte"
  .venv/bin/python -m mvlm.export --pte-name build/demo/mobilevlm.pte --with-artifacts
fi

question="What color is the circle?"
say "asking about build/demo/sample.jpg: $question"
.venv/bin/llava_main --model_path build/demo/mobilevlm.pte --image_path build/demo/sample.jpg \
  --prompt "$question" --temperature 0

cat >&2 <<'TXT'

== what you would type next

  # another question about the picture
  .venv/bin/llava_main --model_path build/demo/mobilevlm.pte --image_path build/demo/sample.jpg --prompt "Describe the image."

  # is the file faithful to the checkpoint? float32, quantized and .pte side by side
  .venv/bin/python -m mvlm.runtime.test_pte build/demo/mobilevlm.pte

  # a real MobileVLM (needs the network or a folder with the checkpoint)
  .venv/bin/python -m mvlm.export --model mtgv/MobileVLM_V2-1.7B --pte-name mobilevlm-v2-1.7b.pte
TXT
