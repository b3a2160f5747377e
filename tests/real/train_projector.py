"""Trains the projector of the gauge's vision-language model: ``python tests/real/train_projector.py --help``.

Only the projector learns, on easy-vqa's training split; language model and vision tower stay as others made them. Four
things make it take under an hour on one CPU core:

* The tower runs once for each picture; its features are kept in a file.
* At first the language model does not run at all: the mean of a picture's image tokens shall be like the embeddings of
  the words for its colour and its shape. After a minute colour and shape can be read off the tokens, and the language
  model has something to learn from.
* The questions about a picture are packed behind it into one sequence, each at the positions it would have on its own
  and hidden from the others. What precedes the picture is the same for all, so its keys and values are computed once.
* The linears of the language model compute in bfloat16, for which newer CPUs have matrix units. Token stream and
  projector are float32.

What this prints as it goes is the accuracy of that arithmetic on pictures of the training split that were left out.
``tests/real/evaluate_vlm.py`` gives that of the float32 model on the test split.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from gauge import DEFAULT_FOLDER, FetchError, PictureQuestion, make_gauge
from gauge.easy_vqa import COLORS, SHAPES, read_questions
from gauge.vlm import PROJECTOR_NAMES, Prompts, pixel_values
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mvlm.export.checkpoint import Checkpoint, open_checkpoint
from mvlm.export.models import MobileLlama, MobileVLM, rope_tables

#: Pictures of the training split that are not trained on; the best of the states is chosen by them.
VALIDATION_PICTURES = 96

#: Tokens of questions and answers behind each picture: nine or ten questions.
ROOM = 128

#: What is asked for, or which kind of word a yes-no question names, and whether the picture has it.
QUESTION_GROUPS = (("what", True), ("color", True), ("color", False), ("shape", True), ("shape", False))

#: Weights of these groups, such that nothing but the picture tells the answer.
BALANCED = (0.1, 0.25, 0.25, 0.2, 0.2)


@dataclass(frozen=True)
class Stage:
    """A part of the training, with questions of its own.

    Attributes:
        name: for the log.
        steps: at the most.
        mix: weights of :data:`QUESTION_GROUPS`; None for the questions that the data set has about each picture.
        goal: kind of question and percent of right answers in validation that end the stage early.
        noise: decibels by which the language model's linears exceed noise that is added to them; None for no noise.
    """

    name: str
    steps: int
    mix: tuple[float, ...] | None = None
    goal: tuple[str, float] | None = None
    noise: float | None = None


#: R by itself does not compare the word in a question with the picture, not even where words describe the picture.
#: Image tokens that make it do so are found by training on little else, first for three shapes, then for eight colours;
#: with all questions at once they were not found. What is found without noise needs these very weights: noise 25 dB
#: below them took the accuracy from 92 to 62 %. A model trained as a whole is not so brittle, so noise is added.
STAGES = (
    Stage("as in the data set", 300),
    Stage("shapes", 700, (0.12, 0.03, 0.25, 0.3, 0.3), ("shape?", 95)),
    Stage("colors, noise", 1000, (0.1, 0.3, 0.3, 0.15, 0.15), ("color?", 95), noise=25.0),
)

#: So many of the language model's layers get other noise at a step; all would take longer than the step.
NEW_NOISE = 3


@dataclass(frozen=True)
class Recipe:
    """What the trained weights depend on, :data:`STAGES` apart.

    Attributes:
        seed: of the first weights and of the order of pictures and questions.
        word_steps: so many steps, at the start, without the language model: the mean of a picture's image tokens shall
            be like the language model's embeddings of the words for its colour and its shape.
        batch, word_batch: pictures a step.
        learning_rate: reached after ``warmup`` steps of a stage and held; over the steps without the language model it
            falls to a hundredth along a cosine.
        weight_decay: of matrices.
    """

    seed: int = 1
    word_steps: int = 150
    batch: int = 6
    word_batch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.01

    def learning_rate_at(self, step: int) -> float:
        return self.learning_rate * min(1.0, (step + 1) / self.warmup)

    def learning_rate_of_words_at(self, step: int) -> float:
        fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.word_steps))
        return self.learning_rate_at(step) * fall


@dataclass
class Batch:
    """Questions, packed behind one picture in each of B rows of Q = :data:`ROOM` tokens.

    Attributes:
        ids: int64 [B, Q]: question and answer after question and answer, without their ends.
        segments: int64 [B, Q]: which question of its picture a token belongs to, -1 for padding.
        positions: int64 [B, Q]: position within the question, from 0.
        targets: int64 [B, Q]: the id that follows in the answer, -1 where nothing is to be learnt.
    """

    ids: Tensor
    segments: Tensor
    positions: Tensor
    targets: Tensor


def pack(prompts: Prompts, questions: Sequence[Sequence[PictureQuestion]]) -> tuple[Batch, list[list[PictureQuestion]]]:
    """A batch of as many questions about each picture as go into :data:`ROOM`, and which they are."""
    rows, taken = [], []
    for asked in questions:
        row: list[tuple[int, int, int, int]] = []
        items: list[PictureQuestion] = []
        for item in asked:
            question, answer = prompts.question(item.question), prompts.answer(item.answer)
            ids = question + answer[:-1]
            if len(row) + len(ids) <= ROOM:
                targets = [-1] * (len(question) - 1) + answer
                row += zip(ids, [len(items)] * len(ids), range(len(ids)), targets, strict=True)
                items.append(item)
        rows.append(row + [(0, -1, 0, -1)] * (ROOM - len(row)))
        taken.append(items)
    table = torch.tensor(rows)
    return Batch(*(table[..., field].contiguous() for field in range(4))), taken


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).bfloat16()


def _block(
    x_BRD: Tensor,
    rope: tuple[Tensor, Tensor],
    mask_B11RS: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    weights: Mapping[str, Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block over R tokens of B rows behind a start that they share; S = start and R.

    Args:
        x_BRD: token stream, float32.
        rope: cosines and sines [B, 1, R, H / 2].
        mask_B11RS: 0 where a token may see, else -inf.
        prefix: keys and values [1, K, S - R, H] of the shared start.
        weights: of the block, linears in bfloat16.
        eps: of the norms.

    Returns:
        the token stream after the block, and keys and values [B, K, R, H] of its tokens.
    """
    B, R, D = x_BRD.shape
    cos, sin = rope
    H = 2 * cos.shape[-1]
    N = D // H
    qkv_BJRH = nn.functional.linear(_norm(x_BRD, weights["input_norm"], eps), weights["qkv"])
    qkv_BJRH = qkv_BJRH.unflatten(-1, (-1, H)).transpose(1, 2)
    K = (qkv_BJRH.shape[1] - N) // 2
    first, second = qkv_BJRH[:, : N + K].float().chunk(2, dim=-1)
    qk_BJRH = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).bfloat16()
    q_BNRH, k_BKRH, v_BKRH = qk_BJRH[:, :N], qk_BJRH[:, N:], qkv_BJRH[:, N + K :]
    k_BKSH, v_BKSH = k_BKRH, v_BKRH
    if prefix is not None:
        k_BKSH = torch.cat([prefix[0].expand(B, -1, -1, -1), k_BKRH], dim=2)
        v_BKSH = torch.cat([prefix[1].expand(B, -1, -1, -1), v_BKRH], dim=2)
    # The queries that share a key are the rows of one product.
    scores = torch.bmm(q_BNRH.reshape(B * K, N // K * R, H), k_BKSH.flatten(0, 1).transpose(1, 2))
    scores = scores.view(B, K, N // K, R, -1).float() * H**-0.5 + mask_B11RS
    shares = scores.softmax(-1).bfloat16().view(B * K, N // K * R, -1)
    y_BNRH = torch.bmm(shares, v_BKSH.flatten(0, 1)).view(B, N, R, H)
    x_BRD = x_BRD + nn.functional.linear(y_BNRH.transpose(1, 2).reshape(B, R, D), weights["o"])
    gate, up = nn.functional.linear(_norm(x_BRD, weights["mlp_norm"], eps), weights["gate_up"]).chunk(2, dim=-1)
    return x_BRD + nn.functional.linear(nn.functional.silu(gate) * up, weights["down"]), k_BKRH, v_BKRH


class FrozenLlama:
    """The language model's forward and backward pass over packed questions, its linears in bfloat16.

    Args:
        model: in float32; its weights are copied.
        before: ids in front of the picture.
    """

    def __init__(self, model: MobileLlama, before: Sequence[int]) -> None:
        self.model = model
        self.before = len(before)
        self.layers = [
            {
                "input_norm": layer.input_layernorm.weight,
                "qkv": layer.self_attn.qkv_proj.weight.bfloat16(),
                "o": layer.self_attn.o_proj.weight.bfloat16(),
                "mlp_norm": layer.post_attention_layernorm.weight,
                "gate_up": layer.mlp.gate_up_proj.weight.bfloat16(),
                "down": layer.mlp.down_proj.weight.bfloat16(),
            }
            for layer in model.layers
        ]
        self.exact = [dict(weights) for weights in self.layers]
        self.head = model.lm_head.weight.bfloat16()
        # Compiled, what lies between the products takes a third of the time. All batches have one shape.
        self.block = torch.compile(_block, dynamic=False)
        self.start_1PD = model.embed_tokens(torch.tensor([before]))
        self.start_rope = self._rope(torch.arange(self.before).unsqueeze(0))
        self.start_mask = self._mask(torch.ones(1, self.before, self.before, dtype=torch.bool).tril())

    def set_noise(self, layers: Sequence[int], decibels: float, generator: torch.Generator) -> None:
        """Other normal noise on the linears of some layers, ``decibels`` below each row of their weights."""
        for index in layers:
            for name in ("qkv", "o", "gate_up", "down"):
                weight = self.exact[index][name].float()
                scale = weight.square().mean(dim=1, keepdim=True).sqrt() * 10 ** (-decibels / 20)
                noise = torch.randn(weight.shape, generator=generator)
                self.layers[index][name] = (weight + scale * noise).bfloat16()

    @torch.no_grad()
    def prefix(self, layers: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of what precedes the picture, layer by layer."""
        x_1PD = self.start_1PD
        for weights in layers:
            x_1PD, key, value = _block(
                x_1PD, self.start_rope, self.start_mask, None, weights, self.model.config.rms_norm_eps
            )
            yield key.contiguous(), value.contiguous()

    def _rope(self, positions_BR: Tensor) -> tuple[Tensor, Tensor]:
        config = self.model.config
        tables = rope_tables(config.head_dim, int(positions_BR.max()) + 1, config.rope_theta)
        return tuple(table[positions_BR].unsqueeze(1) for table in tables)

    @staticmethod
    def _mask(visible_BRS: Tensor) -> Tensor:
        return torch.zeros(visible_BRS.shape).masked_fill_(~visible_BRS, -torch.inf)[:, None, None]

    def answer_logits(self, image_BTD: Tensor, batch: Batch, noisy: bool = False) -> tuple[Tensor, Tensor]:
        """Logits [A, V] and targets [A] of the A places of a batch where an answer's token follows."""
        B, T, _ = image_BTD.shape
        P, Q = self.before, batch.ids.shape[1]
        x = torch.cat([image_BTD, self.model.embed_tokens(batch.ids)], dim=1)
        rope = self._rope(torch.cat([torch.arange(P, P + T).expand(B, T), batch.positions + P + T], dim=1))
        visible = torch.zeros(B, T + Q, P + T + Q, dtype=torch.bool)
        visible[:, :, :P] = True
        visible[:, :T, P : P + T] = torch.ones(T, T, dtype=torch.bool).tril()
        visible[:, T:, P : P + T] = True
        same = batch.segments.unsqueeze(2) == batch.segments.unsqueeze(1)
        visible[:, T:, P + T :] = same & torch.ones(Q, Q, dtype=torch.bool).tril()
        mask, eps = self._mask(visible), self.model.config.rms_norm_eps
        layers = self.layers if noisy else self.exact
        for weights, prefix in zip(layers, self.prefix(layers), strict=True):
            x, _, _ = self.block(x, rope, mask, prefix, weights, eps)
        wanted = batch.targets >= 0
        y = _norm(x[:, T:][wanted], self.model.norm.weight, eps)
        return nn.functional.linear(y, self.head).float(), batch.targets[wanted]


@torch.no_grad()
def tower_features(model: MobileVLM, checkpoint: Checkpoint, paths: Sequence[Path], kept: Path) -> Tensor:
    """Features float16 [pictures, P, V] of the tower, read from the file ``kept`` if they were computed before."""
    vision = model.config.vision
    shape = (len(paths), vision.num_patches, vision.hidden_size)
    # Linears in bfloat16; our operators between them take float32 alone.
    for module in model.vision_tower.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: output.float())
    if not kept.exists():
        partial = kept.with_name(kept.name + ".partial")
        table = np.memmap(partial, dtype=np.float16, mode="w+", shape=shape)
        started = time.monotonic()
        for start in range(0, len(paths), 16):
            batch = torch.cat([pixel_values(path, checkpoint) for path in paths[start : start + 16]])
            with torch.autocast("cpu", torch.bfloat16):
                table[start : start + len(batch)] = model.vision_tower(batch).half().numpy()
            if start % 400 == 0:
                print(f"features of {start} of {len(paths)} pictures, {time.monotonic() - started:.0f} s", flush=True)
        table.flush()
        os.replace(partial, kept)
    return torch.from_numpy(np.memmap(kept, dtype=np.float16, mode="r+", shape=shape))


@torch.no_grad()
def initialize(projector: nn.Module, features_BPV: Tensor, token_norm: float, seed: int) -> None:
    """First weights, such that the image tokens of some pictures are about as long as the embeddings of words."""
    torch.manual_seed(seed)
    first, second = projector.mlp[0], projector.mlp[2]
    nn.init.normal_(first.weight, std=(first.in_features * features_BPV.square().mean().item()) ** -0.5)
    nn.init.normal_(second.weight, std=second.in_features**-0.5)
    conv = projector.positional_encoding.conv
    nn.init.normal_(conv.weight, std=0.05)
    for bias in (first.bias, second.bias, conv.bias):
        nn.init.zeros_(bias)
    second.weight *= token_norm / projector(features_BPV).norm(dim=-1).mean()


#: The projector after the last stage that was finished.
STATE = "state.safetensors"


class Log:
    """Lines to the terminal and to a file."""

    def __init__(self, path: Path, append: bool) -> None:
        self._file = path.open("a" if append else "w", encoding="utf-8")

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


class Asker:
    """Asks about training pictures, with the answers that the data set gives.

    The data set asks ten questions or so about each picture. All of its 107 questions can be answered for any picture:
    the answer depends on nothing but colour and shape, and so was given for another picture of the same kind.
    """

    def __init__(self, questions: Sequence[PictureQuestion]) -> None:
        self.own: dict[int, list[PictureQuestion]] = {}
        for item in questions:
            self.own.setdefault(item.picture, []).append(item)
        answers: dict[tuple[str, str], dict[str, str]] = {}
        for asked in self.own.values():
            told = {item.kind: item.answer for item in asked}
            if "color" in told and "shape" in told:
                known = answers.setdefault((told["color"], told["shape"]), {})
                known.update((item.question, item.answer) for item in asked)
        #: Colour and shape of each picture whose questions tell them.
        self.scenes: dict[int, tuple[str, str]] = {}
        for picture, asked in self.own.items():
            possible = [
                scene
                for scene, known in answers.items()
                if all(known.get(item.question, item.answer) == item.answer for item in asked)
            ]
            if len(possible) == 1:
                self.scenes[picture] = possible[0]
        #: Of each scene, questions with their answers: (what for, does the word in it fit the picture) -> questions.
        self.sorted: dict[tuple[str, str], dict[tuple[str, bool], list[tuple[str, str]]]] = {}
        for scene, known in answers.items():
            groups = self.sorted.setdefault(scene, {})
            for question, answer in known.items():
                words = question.rstrip("?").split()
                named = next((word for word in words if word in COLORS or word in SHAPES), "")
                what = "what" if words[0] == "what" else "color" if named in COLORS else "shape"
                groups.setdefault((what, what == "what" or named in scene), []).append((question, answer))

    def natural(self, picture: int, rng: random.Random) -> list[PictureQuestion]:
        """The picture's own questions in random order."""
        return rng.sample(self.own[picture], len(self.own[picture]))

    def mixed(self, picture: int, count: int, mix: Sequence[float], rng: random.Random) -> list[PictureQuestion]:
        """Questions of chosen kinds.

        Args:
            picture: that they are about.
            count: how many.
            mix: weights of "what" questions, of yes-no questions that name a colour that the picture has, or another
                colour, or a shape that the picture has, or another shape.
            rng: by which they are chosen.
        """
        path, asked = self.own[picture][0].path, []
        for _ in range(count):
            group = rng.choices(QUESTION_GROUPS, mix)[0]
            question, answer = rng.choice(self.sorted[self.scenes[picture]][group])
            asked.append(PictureQuestion(picture, path, question, answer))
        return asked


class Trainer:
    """The model, the pictures' features, and the projector that learns.

    Args:
        recipe: what the result depends on.
        checkpoint: the vision-language model; its projector's weights are replaced.
        data: easy-vqa's folder.
        work: where features and the best projector so far are written.
        log: takes lines.
    """

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint, data: Path, work: Path, log: Log) -> None:
        self.recipe, self.work, self.log = recipe, work, log
        self.model = checkpoint.load_model()
        self.prompts = Prompts(checkpoint)
        self.asker = Asker(read_questions(data, "train"))
        pictures = sorted(self.asker.own)
        paths = [self.asker.own[index][0].path for index in pictures]
        self.features = tower_features(self.model, checkpoint, paths, work / "features.f16")
        random.Random(f"{recipe.seed}/validation").shuffle(pictures)
        pictures = [index for index in pictures if index in self.asker.scenes]
        self.validation, self.training = pictures[:VALIDATION_PICTURES], pictures[VALIDATION_PICTURES:]
        self.log(f"colour and shape are known of {len(pictures)} of {len(paths)} pictures")
        self.language = FrozenLlama(self.model.language_model, self.prompts.before)
        self.projector = self.model.mm_projector
        embeddings = self.model.language_model.embed_tokens.weight
        initialize(self.projector, self.features[:64].float(), embeddings.norm(dim=1).mean().item(), recipe.seed)
        self.projector.requires_grad_(True)
        self.words = [
            torch.stack([embeddings[self.prompts.word(word)].mean(0) for word in words]) for words in (COLORS, SHAPES)
        ]

    def batches(self, size: int, name: str) -> Iterator[list[int]]:
        """Training pictures in random order, over and over."""
        rng, order = random.Random(f"{self.recipe.seed}/{name}"), []
        while True:
            if len(order) < size:
                order += rng.sample(self.training, len(self.training))
            yield [order.pop(0) for _ in range(size)]

    def optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.projector.parameters() if p.ndim >= 2]
        others = [p for p in self.projector.parameters() if p.ndim < 2]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=self.recipe.learning_rate,
            betas=(0.9, 0.98),
        )

    def word_loss(self, image_BTD: Tensor, pictures: Sequence[int]) -> Tensor:
        """How badly the words for colour and shape are told by the mean of the image tokens."""
        pooled = image_BTD.mean(1)
        loss = pooled.new_zeros(())
        for words, table in zip((COLORS, SHAPES), self.words, strict=True):
            target = torch.tensor([words.index(self.asker.scenes[index][words is SHAPES]) for index in pictures])
            loss = loss + nn.functional.cross_entropy(4 * pooled @ table.T, target)
        return loss

    def encode(self, pictures: Sequence[int]) -> Tensor:
        """Image embeddings [B, T, D]."""
        return self.projector(self.features[torch.tensor(pictures)].float())

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> float:
        """One step of the optimizer; returns the loss."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.projector.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def validate(self, noisy: bool) -> dict[str, float]:
        """Share of right answers about pictures that were not trained on, in percent, by kind of question.

        ``all`` is that of the data set's questions, ``noisy`` the same with the noise of the stage; ``color?`` and
        ``shape?`` are yes or no to balanced ones.
        """
        right: dict[str, list[bool]] = {"all": []}
        size, rng = self.recipe.batch, random.Random(f"{self.recipe.seed}/asked in validation")

        def answers(mix: Sequence[float] | None, noisy: bool = False) -> Iterator[tuple[PictureQuestion, bool]]:
            for start in range(0, len(self.validation), size):
                pictures = self.validation[start : start + size]
                batch, asked = pack(self.prompts, [self.ask(index, mix, rng) for index in pictures])
                logits, targets = self.language.answer_logits(self.encode(pictures), batch, noisy)
                wanted = batch.targets >= 0
                hit = logits.argmax(1) == targets
                rows = torch.arange(len(pictures)).unsqueeze(1).expand_as(wanted)[wanted]
                missed = set(zip(rows[~hit].tolist(), batch.segments[wanted][~hit].tolist(), strict=True))
                for row, items in enumerate(asked):
                    yield from ((item, (row, segment) not in missed) for segment, item in enumerate(items))

        for item, hit in answers(None):
            right["all"].append(hit)
            right.setdefault(item.kind, []).append(hit)
        for item, hit in answers(BALANCED):
            if item.kind == "yes/no":
                kind = "color?" if any(color in item.question for color in COLORS) else "shape?"
                right.setdefault(kind, []).append(hit)
        if noisy:
            right["noisy"] = [hit for _, hit in answers(None, noisy=True)]
        return {kind: 100 * sum(hits) / len(hits) for kind, hits in right.items()}

    def ask(self, picture: int, mix: Sequence[float] | None, rng: random.Random) -> list[PictureQuestion]:
        return self.asker.mixed(picture, ROOM // 10, mix, rng) if mix else self.asker.natural(picture, rng)

    def train(self, resume: bool) -> None:
        """Trains to the end of the recipe. What validated best so far is kept in ``projector.safetensors``.

        Args:
            resume: from the start of the stage after the last one that was finished.
        """
        self.started = time.monotonic()
        finished = self.load() if resume else 0
        if not resume:
            self.train_words()
        self.validate_and_log()
        optimizer = self.optimizer()
        for number, stage in enumerate(STAGES[finished:], finished + 1):
            self.log(f"stage {number} of {len(STAGES)}: {stage.name}")
            self.train_stage(stage, optimizer)
            self.save(STATE, finished=str(number))

    def seconds(self) -> str:
        return f"{time.monotonic() - self.started:.0f} s"

    def validate_and_log(self, noisy: bool = False) -> dict[str, float]:
        found = self.validate(noisy)
        self.log("validation: " + "  ".join(f"{kind} {share:.1f} %" for kind, share in found.items()))
        return found

    def train_words(self) -> None:
        """The start, without the language model."""
        recipe, optimizer = self.recipe, self.optimizer()
        batches = self.batches(recipe.word_batch, "words")
        for step in range(recipe.word_steps):
            pictures = next(batches)
            loss = self.word_loss(self.encode(pictures), pictures)
            loss = self.step(optimizer, loss, recipe.learning_rate_of_words_at(step))
            if (step + 1) % 50 == 0:
                self.log(f"words: step {step + 1}/{recipe.word_steps}  loss {loss:.4f}  {self.seconds()}")

    def train_stage(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        """Trains through the language model."""
        recipe = self.recipe
        batches = self.batches(recipe.batch, stage.name)
        rng, generator = random.Random(f"{recipe.seed}/{stage.name}/asked"), torch.Generator().manual_seed(recipe.seed)
        noisy, every, best, losses = stage.noise is not None, range(len(self.language.layers)), 0.0, []
        if noisy:
            self.language.set_noise(every, stage.noise, generator)
        for step in range(stage.steps):
            pictures = next(batches)
            if noisy:
                self.language.set_noise(rng.sample(every, NEW_NOISE), stage.noise, generator)
            batch, _ = pack(self.prompts, [self.ask(index, stage.mix, rng) for index in pictures])
            logits, targets = self.language.answer_logits(self.encode(pictures), batch, noisy)
            loss = nn.functional.cross_entropy(logits, targets)
            losses.append(self.step(optimizer, loss, recipe.learning_rate_at(step)))
            if (step + 1) % 20 == 0:
                mean = sum(losses) / len(losses)
                self.log(f"step {step + 1}/{stage.steps}  loss {mean:.4f}  {self.seconds()}")
                losses.clear()
            if (step + 1) % 100 == 0 or step + 1 == stage.steps:
                found = self.validate_and_log(noisy)
                score = found["all"] + found.get("noisy", 0.0)
                if score >= best:
                    best = score
                    self.save("projector.safetensors")
                if stage.goal and found[stage.goal[0]] >= stage.goal[1]:
                    break

    def save(self, name: str, **facts: str) -> None:
        """Writes the projector as MobileVLM's checkpoints hold it, float16."""
        weights = self.projector.state_dict()
        tensors = {theirs: weights[ours].half().contiguous() for theirs, ours in PROJECTOR_NAMES.items()}
        partial = self.work / f"{name}.partial"
        save_file(tensors, partial, metadata={"recipe": json.dumps(asdict(self.recipe))} | facts)
        os.replace(partial, self.work / name)

    def load(self) -> int:
        """Takes up the projector at the end of a stage; returns which."""
        with safe_open(self.work / STATE, "pt") as state:
            self.projector.load_state_dict(
                {ours: state.get_tensor(theirs).float() for theirs, ours in PROJECTOR_NAMES.items()}
            )
            return int(state.metadata()["finished"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gauge", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="the gauge; what it lacks is made"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_FOLDER / "training",
        metavar="DIR",
        help="where features, log and the best projector so far go",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on after the last stage that was finished")
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
    if options.resume and not (options.output / STATE).exists():
        parser.error(f"{options.output / STATE}: no such file; no stage was finished, start without --resume")
    try:
        gauge = make_gauge(options.gauge)
    except FetchError as error:
        parser.exit(1, f"{error}\n")
    options.output.mkdir(parents=True, exist_ok=True)
    log = Log(options.output / "train.log", append=options.resume)
    log(", ".join(f"{name} {value}" for name, value in asdict(recipe).items()))
    checkpoint = open_checkpoint(str(gauge.vision_language_model))
    Trainer(recipe, checkpoint, gauge.easy_vqa, options.output, log).train(options.resume)
    return 0


if __name__ == "__main__":
    sys.exit(main())
