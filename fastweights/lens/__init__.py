"""What a fast weight memory knows: for a trained model and a text, what each head wrote, kept and recalls; measures and one figure."""

from .measure import Recall, effective_rank, kept, retrieval_error, trajectory
from .plots import plot
from .seen import Errors, Seen, look

__all__ = ["Errors", "Recall", "Seen", "effective_rank", "kept", "look", "plot", "retrieval_error", "trajectory"]
