"""The live values of a cluster against what is safe."""
