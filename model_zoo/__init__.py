"""Model families as data: recipes, tiny configurations, a small trained model."""
