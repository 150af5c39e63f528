"""What a rule is: roles, the ``@rule`` decorator, tracing, and the normal form."""
