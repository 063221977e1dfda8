"""What the exposed model gives away: the backdoor's label and its trigger."""
