"""The only package that imports llama_cpp, and only ever inside a child process.

llama.cpp reports many failures by ending the process (GGML_ASSERT, SIGILL, a lost RPC worker, the OOM
killer), so nothing in here may run in the process that holds the user's terminal or records.
"""
