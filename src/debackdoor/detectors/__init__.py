"""What gives a backdoor away: the label and the trigger that the exposed model shows, and large margins."""
