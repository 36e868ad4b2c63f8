"""What workers of training import, loaded once by the process that they are forked from."""

import gc

import pytest  # noqa: F401
import torch._dynamo  # noqa: F401  by the first optimiser

from pipeline.training import engine, loop, worker_group  # noqa: F401

engine.import_deepspeed()
gc.freeze()  # DeepSpeed collects garbage whenever it cuts up a model, and need not look at all that
