"""Models made here instead of downloaded: the speaking demo and true-shape files with random weights."""

from qnext.models.synth.demo import DEMO_SENTENCE, demo_path, make_demo
from qnext.models.synth.ftypes import FILE_TYPES
from qnext.models.synth.shapes import SHAPES
from qnext.models.synth.synthesise import SynthReport, synthesise
from qnext.models.synth.weights import Quantizer

__all__ = [
    "DEMO_SENTENCE",
    "FILE_TYPES",
    "SHAPES",
    "Quantizer",
    "SynthReport",
    "demo_path",
    "make_demo",
    "synthesise",
]
