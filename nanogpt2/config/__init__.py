"""What a run is told: the model's shape, how to decode, what to show, how to train.

Frozen dataclasses whose fields are at once the Python options and the command-line flags: a field's
type, default, range and help text stand in one place. A value out of range raises ValueError from
the constructor. Nothing here knows what a tensor is.

model.py: the shape of a GPT-2, and what may stand for one. generation.py: the options of
generate(). sample.py and train.py: the scripts' command lines. flags.py, a floor below, declares,
checks and reads a field of any of them. All names are to be imported from here.
"""

from nanogpt2.config.flags import MAX_SEED, fail, parse, usage_error, value_of
from nanogpt2.config.generation import FROM_CHECKPOINT, SENSIBLE_SAMPLING, GenerationConfig
from nanogpt2.config.model import (
    DEVICES,
    DTYPES,
    IGNORE_INDEX,
    KERNELS,
    MODEL_NAMES,
    MOST_LAYERS,
    MOST_PARAMETERS,
    PICKLES,
    PRESETS,
    SCHEMES,
    GPTConfig,
    TokenIds,
    check_model,
)
from nanogpt2.config.sample import (
    DECODING_FLAGS,
    NEUTRAL_FLAGS,
    SAMPLING_FLAGS,
    SampleConfig,
    refuse_ignored,
)
from nanogpt2.config.train import (
    DATA_KINDS,
    DATA_NAMES,
    TrainConfig,
    check_data,
    data_files,
    data_kind,
)

__all__ = [
    "TokenIds",
    "MOST_LAYERS",
    "MOST_PARAMETERS",
    "GPTConfig",
    "PRESETS",
    "MODEL_NAMES",
    "PICKLES",
    "DEVICES",
    "DTYPES",
    "KERNELS",
    "IGNORE_INDEX",
    "SCHEMES",
    "check_model",
    "FROM_CHECKPOINT",
    "GenerationConfig",
    "SENSIBLE_SAMPLING",
    "SAMPLING_FLAGS",
    "NEUTRAL_FLAGS",
    "DECODING_FLAGS",
    "SampleConfig",
    "refuse_ignored",
    "DATA_NAMES",
    "DATA_KINDS",
    "TrainConfig",
    "check_data",
    "data_files",
    "data_kind",
    "MAX_SEED",
    "parse",
    "fail",
    "value_of",
    "usage_error",
]
