"""How a rule runs over time: recurrent, parallel and chunk forms, and the choice between them."""
