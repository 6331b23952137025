"""Generated from proto/halfmoon/v1 by `make proto`; do not edit."""
