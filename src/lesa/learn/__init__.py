"""From recorded runs to rows: recording, planning, fitting."""
