"""Engines and model libraries that run their experts on the ops, each in a module of its own that imports its package
only when it is asked for something. Importing torch_mxfp8moe imports none of them."""
