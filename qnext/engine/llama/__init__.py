"""The only package that loads llama-cpp-python, and all but `quantize` only ever inside a child process.

llama.cpp reports many failures by ending the process (GGML_ASSERT, SIGILL, a lost RPC worker, the OOM
killer), so nothing in here may run in the process that holds the user's terminal or records.
"""
