"""Every worker uses one thread, so that results do not depend on how many workers there are."""

import torch

torch.set_num_threads(1)
