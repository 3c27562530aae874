"""Recipes, one file each; they hold only strings and numbers, and all start from `common.base()`."""
