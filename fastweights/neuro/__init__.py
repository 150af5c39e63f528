"""Plasticity as fast weights: what animals, neurons and synapses are given (``protocols``), what is written down (``recorder``),
the rules that are not affine (``rules``), and the classical figures over their analytic curves (``figures``)."""
