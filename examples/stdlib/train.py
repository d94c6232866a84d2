"""Train the demo models from nothing: tokenizer, target and draft, on the running interpreter's standard library.

    python examples/stdlib/train.py            # everything, into examples/stdlib/
    python examples/stdlib/train.py --only draft

Writes `target/` and `draft/` in the Hugging Face layout, each with a model card that holds the measured bits per byte.
"""

import argparse
import json
import math
import platform
import random
import time
from pathlib import Path

import torch
from corpus import Module, functions, modules
from net import Net, NetConfig
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
CONTEXT = 1152
CONFIGS = {
    "target": NetConfig(384, 1024, 6, 6, 2, 64, max_position_embeddings=CONTEXT),
    "draft": NetConfig(128, 384, 3, 4, 2, 32, max_position_embeddings=CONTEXT),
}
# A line break takes its indentation with it; words take the space before them.
PIECES = r"\n[ \t]*| ?[A-Za-z]+|_+| ?[0-9]| ?[^\sA-Za-z0-9_]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of 4,096 tokens (Sennrich et al. 2016; bytes as in GPT-2) that begins each text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def token_stream(corpus: list[Module], tokenizer: Tokenizer, rng: random.Random) -> torch.Tensor:
    """One epoch as one line of token ids: every module, and every documented function by itself, shuffled."""
    texts = [m.text for m in corpus] + [f.head + f.body for m in corpus for f in functions(m)]
    rng.shuffle(texts)
    eos = tokenizer.token_to_id(EOS)
    ids = [i for e in tokenizer.encode_batch(texts) for i in (*e.ids, eos)]
    return torch.tensor(ids, dtype=torch.int32)


def train(net: Net, stream: torch.Tensor, steps: int, batch: int, device: str, fused: bool) -> None:
    """Muon (Jordan et al. 2024) for the matrices, AdamW for the rest, warm-up and linear decay to zero, in place."""
    matrices = [p for n, p in net.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in net.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    offsets = torch.randperm(len(stream) // CONTEXT - 1).repeat(math.ceil(steps * batch * CONTEXT / len(stream)) + 1)
    loss_of = torch.compile(net.loss) if fused else net.loss
    started, running = time.perf_counter(), 0.0
    for step in range(steps):
        decay = min((step + 1) / 100, (steps - step) / (0.7 * steps), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * decay
        rows = offsets[step * batch : (step + 1) * batch] * CONTEXT
        ids = torch.stack([stream[r : r + CONTEXT + 1] for r in rows.tolist()]).long().to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if step % 20 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            rate = (step + 1) * batch * CONTEXT / seconds
            left = seconds / (step + 1) * (steps - step - 1)
            print(f"step {step} loss {running:.3f} {rate:.0f} tokens/s, {left / 60:.0f} min left", flush=True)


@torch.no_grad()
def bits_per_byte(net: Net, corpus: list[Module], tokenizer: Tokenizer, device: str) -> float:
    """Bits per byte of whole files: windows of the full context, half a context apart, each token scored once."""
    bits, size, stride = 0.0, 0, CONTEXT // 2
    for module in corpus:
        ids = torch.tensor([tokenizer.encode(module.text).ids])
        size += len(module.text.encode())
        for start in range(0, ids.shape[1] - 1, stride):
            window = ids[:, start : start + CONTEXT + 1].to(device)
            loss = net.loss(window, reduction="none")[0]
            scored = loss if start == 0 else loss[CONTEXT - stride :]
            bits += scored.sum().item() / math.log(2)
            if start + CONTEXT + 1 >= ids.shape[1]:
                break
    return bits / size


def save(net: Net, tokenizer: Tokenizer, folder: Path, card: str) -> None:
    """The Hugging Face layout: config, generation config, tokenizer, bf16 weights, model card."""
    folder.mkdir(parents=True, exist_ok=True)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)

    def write_json(name: str, value: dict[str, object]) -> None:
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")

    write_json("config.json", net.c.to_json(bos, eos))
    write_json("generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
    write_json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = {"model." + n: p.detach().cpu().to(torch.bfloat16).contiguous() for n, p in net.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "README.md").write_text(card)


def card(name: str, net: Net, bpb: float, corpus: list[Module], args: argparse.Namespace, minutes: float) -> str:
    """What the model is, how it was made and what it measured."""
    held = [m for m in corpus if m.held_out]
    parameters = sum(p.numel() for p in net.parameters())
    steps = getattr(args, f"{name}_steps")
    return f"""# {name}: a {parameters / 1e6:.1f}M-parameter Python model

Llama architecture, {net.c.num_hidden_layers} layers, {net.c.hidden_size} wide, grouped-query attention \
({net.c.num_attention_heads} heads, {net.c.num_key_value_heads} of keys and values), tied embeddings, context {CONTEXT}.
Made from nothing by `examples/stdlib/train.py` for batchinfer's demo and tests; it completes Python functions.

- Trained on the standard library of Python {platform.python_version()}: {len(corpus) - len(held)} modules, \
whole and function by function; tests, encodings and generated data left out.
- {steps} steps of {args.batch} sequences of {CONTEXT} tokens, Muon and AdamW, bf16 autocast on {args.device}, \
{minutes:.0f} minutes, torch {torch.__version__}, seed {args.seed}.
- **Held-out quality: {bpb:.3f} bits per byte** on {len(held)} modules never trained on \
({sum(len(m.text.encode()) for m in held):,} bytes; windows of {CONTEXT} tokens, {CONTEXT // 2} apart).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--only", choices=list(CONFIGS))
    parser.add_argument("--target-steps", type=int, default=1700)
    parser.add_argument("--draft-steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="fuse: a fifth faster, needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    corpus = modules()
    seen = [m for m in corpus if not m.held_out]
    held = [m for m in corpus if m.held_out]
    tokenizer = train_tokenizer([m.text for m in seen])
    stream = token_stream(seen, tokenizer, random.Random(args.seed))
    print(f"{len(seen)} modules, {len(held)} held out, {len(stream):,} tokens an epoch", flush=True)
    for name, config in CONFIGS.items():
        if args.only not in (None, name):
            continue
        torch.manual_seed(args.seed)
        net = Net(config).to(args.device)
        started = time.perf_counter()
        train(net, stream, getattr(args, f"{name}_steps"), args.batch, args.device, args.compile)
        bpb = bits_per_byte(net, held, tokenizer, args.device)
        print(f"{name}: {bpb:.4f} bits per byte held out", flush=True)
        minutes = (time.perf_counter() - started) / 60
        save(net, tokenizer, args.out / name, card(name, net, bpb, corpus, args, minutes))


if __name__ == "__main__":
    main()
