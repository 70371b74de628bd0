"""What is minimised, and how its weight and the learning rate move with the step."""
