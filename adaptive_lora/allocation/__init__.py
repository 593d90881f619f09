"""Numbers in, ranks out: importance, budget, rule. Knows no module and no Trainer."""
