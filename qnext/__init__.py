"""qnext: plan, run and measure mixture-of-experts models on ordinary machines through llama.cpp."""

__version__ = "0.1.0"
