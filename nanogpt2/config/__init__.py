"""Every option of a run: the model's shape, decoding, output, training.

Options are fields of frozen dataclasses. A field is both a Python option and a command-line flag;
its type, default, range and help text stand in one place. The constructor raises ValueError for a
value out of range. Nothing here knows tensors.

model.py: the shape of a GPT-2, and the names and files of models. generation.py: the options of
generate(). sample.py and train.py: the scripts' command lines. sources.py: the files that a source
names; corpora.py: those that other programs prepared; documents.py: those that are no text.
flags.py, one floor below, declares, checks and reads the fields. Import every name from this
package.
"""

from nanogpt2.config.corpora import SHARD_MAGICS, TOKEN_KINDS
from nanogpt2.config.documents import refuse_document
from nanogpt2.config.flags import MAX_SEED, fail, parse, usage_error, value_of
from nanogpt2.config.generation import FROM_CHECKPOINT, SENSIBLE_SAMPLING, GenerationConfig
from nanogpt2.config.mix import read_mix
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
    official_name,
    other_format,
    repository_of,
)
from nanogpt2.config.sample import (
    DECODING_FLAGS,
    SAMPLING_FLAGS,
    SEARCH_FLAGS,
    SampleConfig,
    decoding_options,
    refuse_ignored,
)
from nanogpt2.config.sources import (
    DATA_KINDS,
    DATA_NAMES,
    Skip,
    check_data,
    data_files,
    data_kind,
    data_splits,
    no_report,
)
from nanogpt2.config.train import TrainConfig, is_encoding

__all__ = [
    "TokenIds",
    "MOST_LAYERS",
    "MOST_PARAMETERS",
    "GPTConfig",
    "PRESETS",
    "MODEL_NAMES",
    "PICKLES",
    "other_format",
    "DEVICES",
    "DTYPES",
    "KERNELS",
    "IGNORE_INDEX",
    "SCHEMES",
    "check_model",
    "official_name",
    "repository_of",
    "FROM_CHECKPOINT",
    "GenerationConfig",
    "SENSIBLE_SAMPLING",
    "SAMPLING_FLAGS",
    "DECODING_FLAGS",
    "SEARCH_FLAGS",
    "decoding_options",
    "SampleConfig",
    "SHARD_MAGICS",
    "TOKEN_KINDS",
    "refuse_document",
    "refuse_ignored",
    "read_mix",
    "DATA_NAMES",
    "DATA_KINDS",
    "TrainConfig",
    "is_encoding",
    "check_data",
    "data_files",
    "data_kind",
    "data_splits",
    "Skip",
    "no_report",
    "MAX_SEED",
    "parse",
    "fail",
    "value_of",
    "usage_error",
]
