"""From the records of a run to its report: frames, contrasts, statistics, audit, figures, report. pandas lives here."""
