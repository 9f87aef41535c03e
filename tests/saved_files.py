"""Models as other programs write them, by hand in the documented layouts, and their mutants."""

import io
import json
import lzma
import struct
import zipfile
import zlib

import torch
from reference import TINY, hf_model
from torch import nn
from torch.nn import functional as F

LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def their_state(config=TINY, seed=0):
    """The state dict of GPT2LMHeadModel, and its logits as a function of ids."""
    model = hf_model(config, seed)
    return model.state_dict(), lambda ids: model(ids).logits.detach()


def as_linear(state):
    """Projections as torch's Linear stores them: [out, in]."""
    return {n: t.t().contiguous() if n.endswith(LINEAR) else t for n, t in state.items()}


class Karpathy(nn.Module):
    """nanoGPT and minGPT by their state dicts, restated: projections [out, in], maybe no biases."""

    def __init__(self, state, n_head, exact):
        super().__init__()
        self.state, self.n_head, self.gelu = state, n_head, "none" if exact else "tanh"

    def layer(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, x, name):
        weight = self.state[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.state.get(f"{name}.bias"), 1e-5)

    def forward(self, ids):
        wte, wpe = (self.state[f"transformer.{n}.weight"] for n in ("wte", "wpe"))
        x = wte[ids] + wpe[: ids.size(1)]  # (B, T, C)
        blocks = {name.split(".")[2] for name in self.state if name.startswith("transformer.h.")}
        for block in (f"transformer.h.{i}" for i in range(len(blocks))):
            q, k, v = (
                t.unflatten(2, (self.n_head, -1)).transpose(1, 2)
                for t in self.layer(self.norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(
                    3, dim=2
                )
            )  # (B, H, T, D)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.layer(y.transpose(1, 2).flatten(2), f"{block}.attn.c_proj")
            y = self.layer(self.norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
            x = x + self.layer(F.gelu(y, approximate=self.gelu), f"{block}.mlp.c_proj")
        return self.norm(x, "transformer.ln_f") @ self.state["lm_head.weight"].t()


def nanogpt(config=TINY, bias=True, seed=0, optimizer=True):
    """What nanoGPT's train.py saves, compiled, and its model."""
    state = as_linear(their_state(config, seed)[0])
    if not bias:
        state = {n: t for n, t in state.items() if not n.endswith(".bias")}
    model = Karpathy(state, config.n_head, exact=True)
    args = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    args |= {"block_size": config.block_size, "bias": bias, "vocab_size": config.vocab_size}
    moments = {
        i: {"step": torch.tensor(1.0), "exp_avg": t + 1} for i, t in enumerate(state.values())
    }
    saved = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "model_args": args | {"dropout": 0.0},
        "iter_num": 10,
        "best_val_loss": torch.tensor(3.5),
        "config": {"out_dir": "out", "eval_interval": 2000, "compile": True},
    }
    return saved if optimizer else {n: v for n, v in saved.items() if n != "optimizer"}, model


def llmc(config=TINY, version=3, padded=64, seed=0):
    """The bytes that llm.c's train_gpt2.py writes, and the logits of the model."""
    state, logits = their_state(config, seed)
    state = {name.removeprefix("transformer."): t for name, t in as_linear(state).items()}
    rows = padded if version > 1 else config.vocab_size
    header = [20240326, version, config.block_size, config.vocab_size, config.n_layer]
    header += [config.n_head, config.n_embd, rows if version > 1 else 0]
    dtype = torch.bfloat16 if version == 5 else torch.float32
    parts = [F.pad(state["wte.weight"], (0, 0, 0, rows - config.vocab_size), value=7.0)]
    parts.append(state["wpe.weight"])
    for kind in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for end in ("weight", "bias"):
            parts += [state[f"h.{i}.{kind}.{end}"] for i in range(config.n_layer)]
    parts += [state["ln_f.weight"], state["ln_f.bias"]]
    data = struct.pack("<256i", *header, *[0] * (256 - len(header)))
    for part in parts:
        data += part.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data, logits


def saved_bytes(value, **options):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def repacked(data, change=dict, compression=zipfile.ZIP_STORED):
    """A zip file with `change` applied to its records, {name: bytes}, without their folder."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in change(records).items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def with_pickle(data, pickle):
    """The same file with another pickle."""
    return repacked(data, lambda records: records | {"data.pkl": pickle})


def pickle_of(data):
    """The pickle of a zip file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name.partition("/")[2]: name for name in archive.namelist()}
        return archive.read(records["data.pkl"])


# ---- mutants


def flip(data, rng, low, high):
    data = bytearray(data)
    data[rng.randrange(low, min(high, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(data)


def rewrite_bytes(data, rng, low, high):
    """Take some bytes out, put others in."""
    place = rng.randrange(low, min(high, len(data)))
    return data[:place] + rng.randbytes(rng.randrange(9)) + data[place + rng.randrange(9) :]


def edit_pickle(data, rng):
    """A zip file that is whole, its pickle changed in a few places."""
    pickle = bytearray(pickle_of(data))
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(pickle))
        match rng.randrange(5):
            case 0:
                pickle[place] = rng.randrange(256)
            case 1:
                pickle[place:place] = rng.choice(
                    [b"N", b"0", b"(", b"t", b"R", b"Q", b"\x86", b"b"]
                )
            case 2:
                del pickle[place : place + rng.randrange(1, 9)]
            case 3:
                # a number: a shape, a stride, a size or an offset
                numbers = [i for i, byte in enumerate(pickle[:-2]) if byte in b"KM"]
                pickle[rng.choice(numbers) + 1] = rng.randrange(256)
            case 4:
                start, end = sorted(rng.choices(range(len(pickle)), k=2))
                pickle[place:place] = pickle[start : min(end, start + 60)]
    return with_pickle(data, bytes(pickle))


def edit_records(data, rng):
    """A zip file that is whole, its records swapped, dropped, renamed, cut or grown."""

    def change(records):
        names = [name for name in records if name.startswith("data/")]
        one, other = rng.sample(names, 2)
        match rng.randrange(5):
            case 0:
                records[one], records[other] = records[other], records[one]
            case 1:
                del records[rng.choice([one, "data.pkl", "byteorder"])]
            case 2:
                records[rng.choice(["data/99", "../x", "code/a.py"])] = records.pop(one)
            case 3:
                records[one] = records[one][: rng.randrange(len(records[one]) + 1)]
            case 4:
                records[one] += bytes(rng.randrange(1, 99))
        return records

    return repacked(data, change)


NOTHING_TO_EDIT = (
    *(zipfile.BadZipFile, zlib.error, struct.error, lzma.LZMAError),
    *(LookupError, ValueError, EOFError, OSError, RuntimeError, OverflowError),
)


def mutant(data, rng, headers):
    """One to three mistakes of any kind. headers: bytes at the start and the end to aim at."""
    is_zip = data.startswith(b"PK")
    for mistake in rng.choices(range(8), k=rng.choice([1, 1, 1, 2, 3])):
        if len(data) < 99:
            break
        end = max(len(data) - headers, 0)
        try:
            data = {
                0: lambda d: flip(d, rng, 0, headers),
                1: lambda d, end=end: flip(d, rng, end, len(d)),
                2: lambda d: flip(d, rng, 0, len(d)),
                3: lambda d: rewrite_bytes(d, rng, 0, headers),
                4: lambda d: d[: rng.randrange(len(d))],
                5: lambda d: d + rng.randbytes(rng.randrange(1, 9)),
                6: lambda d: edit_pickle(d, rng) if is_zip else rewrite_bytes(d, rng, 0, len(d)),
                7: lambda d: edit_records(d, rng) if is_zip else flip(d, rng, 0, headers),
            }[mistake](data)
        except NOTHING_TO_EDIT:
            # the mistake before it may have left no zip file
            continue
    return data


def config_json(config=TINY, **more):
    """config.json's text."""
    shape = {"vocab_size": config.vocab_size, "n_positions": config.block_size}
    shape |= {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    return json.dumps({"model_type": "gpt2", **shape, **more})
