"""The classical figures of synaptic plasticity, one experiment a file: measured points over the analytic curve."""
