"""What is measured, at the published shapes and at toy ones: one table for all sections."""

import dataclasses
from collections.abc import Mapping

from benchmarks.shapes import ALL_TARGETS, FIVE_TARGETS
from peanut_jax.models.decoder_config import REMAT_POLICIES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One setting of a train step.

    Attributes:
        shapes: Row of `benchmarks.shapes`.
        rows, seq: Sequences a step, and their tokens.
        methods: "lora", or "peanut-D" for PEANuT of depth D; compared with the first.
        remat: As in `DecoderConfig`, tried in turn: the first that fits the memory is measured.
        clip: Largest norm of the gradient.
        late: Measured after everything else, where there is time.
    """

    shapes: str
    rows: int
    seq: int
    rank: int
    targets: tuple[str, ...]
    methods: tuple[str, ...] = ("lora", "peanut-0", "peanut-2")
    remat: tuple[str, ...] = REMAT_POLICIES
    clip: float | None = None
    late: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.seq


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention alone: `heads` query heads over `kv_heads` shared ones; `documents` packed into each row."""

    rows: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    documents: int = 1

    @property
    def name(self) -> str:
        packed = f", {self.documents} packed" if self.documents > 1 else ""
        return f"{self.rows} x {self.seq:,}, {self.heads}/{self.kv_heads} heads{packed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Greedy decoding: batches, tokens of each prompt and new ones, and the adapters that are mixed."""

    shapes: str
    batches: tuple[int, ...]
    prompt: int
    new: int
    rank: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What each section measures.

    Attributes:
        name: "full" or "toy".
        dtype: Of our models.
        matmuls: Sides of the square products whose best is the measured peak.
        copy_bytes: Bytes of the array whose copy is timed.
        steps: Setting of each train step, by name.
        swept: The step whose remat policies and attention roads are compared.
        torch_steps: Those that run in HF PEFT too.
        merged: Shapes whose adapter is merged on the device.
        stored: Shapes of the checkpoint that is written, loaded and merged on disk.
        repeat_seconds: How long each case repeats, once compiled.
        case_seconds: What a case takes about, compiled and repeated, before any has been seen.
    """

    name: str
    dtype: str
    matmuls: tuple[int, ...]
    copy_bytes: int
    steps: Mapping[str, Step]
    swept: str
    torch_steps: tuple[str, ...]
    attention: tuple[Attention, ...]
    decode: Decode
    merged: str
    stored: str
    repeat_seconds: float
    case_seconds: float


# The setting of PEFT's comparison.
_PEFTS = Step(
    shapes="llama-3.2-3b",
    rows=4,
    seq=768,
    rank=32,
    targets=("q_proj", "v_proj"),
    methods=("lora", "peanut-0"),
    clip=1.0,
)

FULL = Sizes(
    name="full",
    dtype="bfloat16",
    matmuls=(4096, 8192, 16384),
    copy_bytes=1 << 32,
    steps={
        "llama-3-8b": Step(shapes="llama-3-8b", rows=2, seq=4096, rank=16, targets=ALL_TARGETS),
        "llama-2-7b": Step(shapes="llama-2-7b", rows=16, seq=256, rank=32, targets=FIVE_TARGETS),
        "llama-3.2-3b": _PEFTS,
        # Nearer to the 210 tokens that the rows of PEFT's comparison have.
        "llama-3.2-3b-short": dataclasses.replace(_PEFTS, seq=256, late=True),
    },
    swept="llama-3-8b",
    torch_steps=("llama-3.2-3b", "llama-3.2-3b-short"),
    attention=(
        Attention(rows=1, seq=4096, heads=32, kv_heads=8, head_dim=128),
        Attention(rows=1, seq=8192, heads=32, kv_heads=8, head_dim=128),
        Attention(rows=1, seq=8192, heads=32, kv_heads=8, head_dim=128, documents=8),
        Attention(rows=1, seq=4096, heads=32, kv_heads=32, head_dim=128),
        Attention(rows=1, seq=32768, heads=32, kv_heads=8, head_dim=128),
    ),
    decode=Decode(shapes="llama-3.2-1b", batches=(1, 8, 64), prompt=128, new=128, rank=16),
    merged="llama-3-8b",
    stored="llama-3.2-1b",
    repeat_seconds=4.0,
    case_seconds=30.0,
)

# In float32, which XLA on CPU compiles in half the time.
TOY = Sizes(
    name="toy",
    dtype="float32",
    matmuls=(64, 128),
    copy_bytes=1 << 20,
    steps={
        "toy": Step(
            shapes="toy",
            rows=2,
            seq=32,
            rank=4,
            targets=("q_proj", "v_proj"),
            methods=("lora", "peanut-2"),
            clip=1.0,
        )
    },
    swept="toy",
    torch_steps=("toy",),
    attention=(Attention(rows=1, seq=64, heads=4, kv_heads=2, head_dim=16, documents=4),),
    decode=Decode(shapes="toy", batches=(2,), prompt=8, new=8, rank=4),
    merged="toy",
    stored="toy",
    repeat_seconds=0.0,
    case_seconds=0.0,
)

SIZES: Mapping[str, Sizes] = {sizes.name: sizes for sizes in (FULL, TOY)}
