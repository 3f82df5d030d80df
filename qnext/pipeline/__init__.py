"""The trips: what `qnext run`, `plan`, `bench` and `synth` do, as plain functions without a terminal."""
