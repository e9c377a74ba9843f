"""What generated images are worth: fidelity, adherence to the asked subtype, and whether they are copies."""
