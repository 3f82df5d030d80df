"""HTTP: an OpenAI-compatible server over a `Backend`. Knows nothing of the engine, hardware or planning."""
