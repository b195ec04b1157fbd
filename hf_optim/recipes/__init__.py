"""What is asked: techniques, their contracts and traits, recipes and how their steps compose."""
