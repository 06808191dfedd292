"""One decoder for every family; an Architecture says how families differ."""

from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.cache_rows import grown, moved, put_row
from tpu_tune.models.classifiers import SCORE, classifier_config, is_classifier, label_names
from tpu_tune.models.decoder import Cache, Decoder, EncoderOutput, apply_head, check_length, empty_cache, encode
from tpu_tune.models.families import FAMILIES, architecture
from tpu_tune.models.names import LayerNames, Names
from tpu_tune.models.rope import Rope
from tpu_tune.models.scan import Execution
from tpu_tune.models.wrappers import WRAPPERS, text_config, with_keys

__all__ = [
    "FAMILIES",
    "SCORE",
    "WRAPPERS",
    "Architecture",
    "Cache",
    "Decoder",
    "EncoderOutput",
    "Execution",
    "LayerKind",
    "LayerNames",
    "Names",
    "Rope",
    "apply_head",
    "architecture",
    "check_length",
    "classifier_config",
    "empty_cache",
    "encode",
    "grown",
    "is_classifier",
    "label_names",
    "moved",
    "put_row",
    "text_config",
    "with_keys",
]
