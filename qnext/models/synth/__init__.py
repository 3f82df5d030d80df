"""Models made here instead of downloaded: the speaking demo and true-shape files with random weights."""

from qnext.models.synth.demo import DEMO_SENTENCE, demo_path, make_demo

__all__ = ["DEMO_SENTENCE", "demo_path", "make_demo"]
