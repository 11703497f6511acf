"""What a user can set: frozen dataclasses, checked when they are made, free of torch. They are the command line."""
