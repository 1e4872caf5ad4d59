"""Train `tales`, the small Llama-shaped checkpoint that llmc's own tests and examples compile.

    python model_zoo/llama/train_tales.py --text grimm.txt shakespeare.txt --out model_zoo/llama/tales

The first text is what the model shall sound like; further texts only teach it more of the language: they fill
`OTHERS` of the first batches, and their share falls linearly to nothing at the end of the run.
The last 5 % of every text is held out, from the tokenizer too. What was done is written to `DIR/README.md`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
VOCAB, CONTEXT = 4096, 1024
WINDOW, TOKENS = 256, 1024  # a step is 4 windows; every fourth step one of CONTEXT, so that RoPE sees it all
# Little dropout, many small steps: the model remembers phrases of its tales. 2026-11-23, same machine:
# 1,561 steps of 2,048 tokens with dropout 0.2 were better on held-out text (perplexity 71, not 123) but wrote
# "a very good man who was a very good man"; 4,500 of 1,024 with 0.1 write varied sentences.
LEARNING_RATE, WARMUP, WEIGHT_DECAY, DROPOUT, OTHERS = 1.5e-3, 100, 0.1, 0.1, 0.4
PROMPTS = ("Once upon a time", "The king said to his daughter", "There was once a poor woodcutter who")
KNOWN_TEXTS = {  # by the first digits of the SHA-256 of the file; both are in the public domain
    "6a3ab3e88661459f": "*Grimms' Fairy Tales* (public domain; the Project Gutenberg text)",
    "86c4e6aa9db7c042": "*Shakespeare's plays* (public domain; the tiny-shakespeare selection)",
}


@dataclass(frozen=True)
class Text:
    """One training text: its bytes `[0, cut)` train, `[cut, size)` are held out, both as prose."""

    title: str
    sha256: str
    size: int
    cut: int
    train: str
    held_out: str


def read_text(path: Path) -> Text:
    """Read a book in UTF-8; hold out what follows the first paragraph break at or after 95 % of its bytes."""
    raw = path.read_bytes()
    cut = raw.find(b"\n\n", len(raw) * 95 // 100) + 2
    if cut < 2 or cut == len(raw):
        raise SystemExit(f"error: no paragraph ends in the last 5 % of {path.name}\nhint: pass a longer text")
    sha256 = hashlib.sha256(raw).hexdigest()
    title = KNOWN_TEXTS.get(sha256[:16], path.name)
    return Text(title, sha256, len(raw), cut, prose(raw[:cut]), prose(raw[cut:]))


def prose(raw: bytes) -> str:
    """Undo the print layout: one line per paragraph (but indented lines, verse, stay), straight quotes.

    A paragraph in capitals is the title of a tale and opens a document: an `EOS` precedes it.
    """
    straight = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"", "_\r")
    text = raw.decode().translate(straight).replace("[*]", "")
    text = "\n\n".join(re.sub(r"\n(?! )", " ", part) for part in re.split(r"\n{2,}", text.strip()))
    text = re.sub(r"\n +", "\n", text)
    return EOS + re.sub(r"\n\n(?=[A-Z][-A-Z ,\[\]]+\n\n)", EOS, text)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose size is a multiple of 64 (a short text has not `VOCAB` pairs to merge)."""
    size = VOCAB
    while True:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS], show_progress=False)
        trainer.initial_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe.train_from_iterator(texts, trainer)
        if bpe.get_vocab_size() % 64 == 0:
            break
        size = bpe.get_vocab_size() // 64 * 64
        if size < 320:  # 256 bytes and EOS are there from the start
            raise SystemExit("error: too few pairs to merge for a vocabulary\nhint: pass a longer text")
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, model_max_length=CONTEXT, model_input_names=names
    )


def build_model(vocab: int, eos: int) -> LlamaForCausalLM:
    """Build the untrained model; every width is a multiple of 64, as the kernels of every target like it."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = eos

    def drop(_module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return dropout(output, DROPOUT, training=model.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:  # Llama itself has no dropout on the residual stream
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model


def draw(streams: Sequence[Tensor], step: int, progress: float, generator: torch.Generator) -> Tensor:
    """Draw the `[rows, length + 1]` tokens of one step, each row a random window of one stream."""
    length = min(CONTEXT if step % 4 == 3 else WINDOW, min(map(len, streams)) - 1)
    rows = []
    for _ in range(max(1, TOKENS // length)):
        other, which, where = torch.rand(3, generator=generator).tolist()
        use_other = len(streams) > 1 and other < OTHERS * (1 - progress)
        stream = streams[1 + int(which * (len(streams) - 1))] if use_other else streams[0]
        start = int(where * (len(stream) - length))
        rows.append(stream[start : start + length + 1])
    return torch.stack(rows)


def loss_of(model: LlamaForCausalLM, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token cross-entropy, in nats, of `tokens[rows, length + 1]`."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Tensor) -> float:
    """Nats per token over the whole stream, each token predicted from at most WINDOW tokens before it."""
    model.eval()
    windows = (stream[None, start : start + WINDOW + 1] for start in range(0, len(stream) - 1, WINDOW))
    return sum(loss_of(model, window, "sum").item() for window in windows) / (len(stream) - 1)


def learn(
    model: LlamaForCausalLM, streams: Sequence[Tensor], judge: Tensor, steps: int, minutes: float, seed: int
) -> str:
    """Train in place by AdamW, cosine schedule; `judge` only watches. Return the facts as Markdown rows."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    generator, started = torch.Generator().manual_seed(seed), time.monotonic()
    step, progress, clock, tokens, losses, timed = 0, 0.0, 0.0, 0, [], False
    while progress < 1:
        cosine = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * cosine
        model.train()
        rows = draw(streams, step, progress, generator)
        with torch.autocast("cpu", torch.bfloat16):  # with avx512_bf16 1.4 times as fast as float32
            loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step, tokens = step + 1, tokens + rows[:, 1:].numel()
        clock = (time.monotonic() - started) / 60
        timed = timed or clock / minutes > step / steps
        progress = max(step / steps, clock / minutes)
        if step % 100 == 0 or progress >= 1:
            train, held_out = sum(losses[-100:]) / len(losses[-100:]), held_out_loss(model, judge)
            print(f"{clock:6.1f} min  step {step:5}  train {train:.3f}  held out {held_out:.3f}", flush=True)
    lead = (
        "the clock led it at times: not repeatable bit for bit" if timed else "the steps led it: repeatable"
    )
    return (
        f"| run | {step} steps (`--steps {steps} --minutes {minutes:g}`) |\n"
        f"| schedule | {lead} |\n"
        "| kept | the last weights, whatever the held-out loss of the steps before |\n"
        f"| seen | {tokens:,} tokens in {clock:.1f} minutes, {torch.get_num_threads()} CPU thread(s) |\n"
        f"| training loss | {train:.3f} per token, with dropout, over the last {len(losses[-100:])} steps |\n"
    )


def write_readme(out: Path, texts: Sequence[Text], results: Sequence[str], facts: str, samples: str) -> None:
    """Write what a reader must know to trust the checkpoint, or to train it again."""
    told = "It is for tests and examples: it tells tales in the manner of its texts and knows nothing."
    parts = ["# tales: a small Llama-shaped model of our own\n"]
    parts += ["Trained by `model_zoo/llama/train_tales.py`.", told + "\n"]
    for text, result in zip(texts, results, strict=True):
        parts.append(f"- {text.title}: {text.size:,} bytes, sha256 `{text.sha256}`.")
        parts.append(f"  Bytes [0, {text.cut}) trained; bytes [{text.cut}, {text.size}) held out: {result}.")
    parts.append(f"\n| fact | value |\n|---|---|\n{facts}")
    parts.append(f"Greedy continuations, as they came out:\n{samples}")
    (out / "README.md").write_text("\n".join(parts), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the checkpoint `tales` from plain text.")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=4500, help="the run ends after this many steps")
    parser.add_argument("--minutes", type=float, default=35.0, help="or after this time, if that is sooner")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    texts = [read_text(path) for path in args.text]
    tokenizer = train_tokenizer([text.train for text in texts])
    encode = tokenizer.backend_tokenizer.encode
    streams = [torch.tensor(encode(text.train).ids) for text in texts]
    held_out = [torch.tensor(encode(text.held_out).ids) for text in texts]
    model = build_model(len(tokenizer), tokenizer.eos_token_id)
    facts = learn(model, streams, held_out[0], args.steps, args.minutes, args.seed)

    model.to(torch.bfloat16).float().eval()  # judge the weights as they are saved
    results, samples = [], ""
    for text, stream in zip(texts, held_out, strict=True):
        loss = held_out_loss(model, stream)
        bits = loss * (len(stream) - 1) / len(text.held_out.encode()) / math.log(2)
        per_token = f"loss {loss:.3f} (perplexity {math.exp(loss):.1f}) per token"
        results.append(f"{per_token}, {bits:.2f} bits per byte")
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**ids, max_new_tokens=80, do_sample=False)[0]
        told = tokenizer.decode(tokens, skip_special_tokens=True)
        samples += f"\n> **{prompt}**{told[len(prompt) :]}\n".replace("\n\n", "\n>\n> ")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    file = args.out / "tokenizer_config.json"
    about = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(
        json.dumps(about, indent=2) + "\n"
    )  # transformers 4 does not know the class by its name in 5
    model.to(torch.bfloat16).save_pretrained(args.out)
    size = sum(p.numel() for p in model.parameters())
    model_row = f"| model | {size:,} parameters, bfloat16; vocabulary {len(tokenizer)} |"
    facts = f"{model_row}\n| seed | {args.seed} |\n{facts}"
    facts += f"| torch, date | {torch.__version__}, {datetime.date.today()} |\n"
    write_readme(args.out, texts, results, facts, samples)
    print((args.out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
