"""As many processes as asked for, which end together and say why."""
