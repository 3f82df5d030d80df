"""Sessions on the real engine: llama.cpp in a child process, driven over framed messages."""
