"""`kvc bench`: what a compressed cache is worth on this machine, next to what its bytes predict.

    rows        what is measured, as records                      no torch
    plan        which measurements a run takes, and their order   no torch
    predict     bytes that a step must read, and what they take
    ceilings    what the device reads, copies and multiplies
    clock       the two ways to time: a call, a decode step
    synthetic   caches that are full without a prompt
    models      the model: a config, random weights
    caches      the ways to hold a cache that are compared
    attention   one attention call, against PyTorch's
    decode      decode steps, the largest batch, the longest context
    prefill     the time to the first token
    warm        compiles ahead, without the device's memory
    worker      one process: a job, or what warms it up
    run         all jobs, on all devices; results as JSON
    tables      the same for people
    plot        the same as a picture

Nothing here is compiled into a model. Timed work has a device for itself; what only compiles runs side by side before.
"""
