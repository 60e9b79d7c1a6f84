"""Generators of the documentation: extensions of Sphinx, pictures, and the pages of tutorials."""
