"""Tables and plots for people. Nothing decides by what is here."""
