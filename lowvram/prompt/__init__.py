"""From a prompt to the text features that the experts read."""
