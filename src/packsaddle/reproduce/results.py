"""What a study's runs show, as plain numbers."""
