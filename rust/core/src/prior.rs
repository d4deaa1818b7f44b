//! The edit prior: what single edits do to the reward on average over prompts.

use crate::config::is_usable;
use crate::error::{Error, Result};

/// Mean and variance of the change of reward by each single edit, against the identity plan.
///
/// Edit `l` skips layer `l`, edit `num_layers + l` repeats it. An edit that was not measured has a NaN mean and
/// variance.
#[derive(Debug, Clone, PartialEq)]
pub struct EditPrior {
    /// Mean change of reward of each edit.
    pub mean: Vec<f64>,
    /// Sample variance over the prompts (0 for a single prompt).
    pub variance: Vec<f64>,
    /// Prompts measured.
    pub count: u32,
}

impl EditPrior {
    /// Averages over prompts; `changes[prompt][edit]` is `None` where an edit was not measured.
    pub(crate) fn from_changes(changes: &[Vec<Option<f64>>], num_edits: usize) -> Self {
        let mut prior = Self {
            mean: vec![f64::NAN; num_edits],
            variance: vec![f64::NAN; num_edits],
            count: u32::try_from(changes.len()).unwrap_or(u32::MAX),
        };
        for edit in 0..num_edits {
            let column: Option<Vec<f64>> = changes.iter().map(|prompt| prompt[edit]).collect();
            if let Some((mean, variance)) = column.as_deref().and_then(mean_and_variance) {
                prior.mean[edit] = mean;
                prior.variance[edit] = variance;
            }
        }
        prior
    }

    /// Checks that the prior has `num_edits` entries and measures every edit that `needed` names.
    pub(crate) fn check(&self, num_edits: usize, needed: impl Fn(usize) -> bool) -> Result<()> {
        for given in [self.mean.len(), self.variance.len()] {
            if given != num_edits {
                return Err(Error::PriorLength {
                    given,
                    expected: num_edits,
                });
            }
        }
        for edit in (0..num_edits).filter(|&edit| needed(edit)) {
            let (mean, variance) = (self.mean[edit], self.variance[edit]);
            if !is_usable(mean) || !is_usable(variance) || variance < 0.0 {
                let layer = edit % (num_edits / 2);
                let action = if edit < num_edits / 2 {
                    "skip"
                } else {
                    "repeat"
                };
                return Err(Error::PriorMissing {
                    action,
                    layer,
                    mean,
                });
            }
        }
        Ok(())
    }
}

#[allow(clippy::cast_precision_loss)] // a probe has far fewer than 2^52 prompts
fn mean_and_variance(sample: &[f64]) -> Option<(f64, f64)> {
    if sample.is_empty() {
        return None;
    }
    let mean = sample.iter().sum::<f64>() / sample.len() as f64;
    let squares: f64 = sample
        .iter()
        .map(|entry| (entry - mean) * (entry - mean))
        .sum();
    let freedom = sample.len().saturating_sub(1).max(1);
    Some((mean, squares / freedom as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_each_edit_and_marks_the_unmeasured() {
        let changes = [vec![Some(1.0), None], vec![Some(3.0), None]];
        let prior = EditPrior::from_changes(&changes, 2);
        assert_eq!(prior.mean[0].to_bits(), 2.0_f64.to_bits());
        assert_eq!(prior.variance[0].to_bits(), 2.0_f64.to_bits());
        assert!(prior.mean[1].is_nan() && prior.variance[1].is_nan());
        assert_eq!(prior.count, 2);
    }

    #[test]
    fn a_needed_edit_must_be_measured() {
        let prior = EditPrior {
            mean: vec![0.0, f64::NAN],
            variance: vec![0.0, 0.0],
            count: 1,
        };
        assert_eq!(prior.check(2, |edit| edit == 0), Ok(()));
        let missing = prior.check(2, |_| true);
        assert!(matches!(
            missing,
            Err(Error::PriorMissing {
                action: "repeat",
                layer: 0,
                ..
            })
        ));
        assert_eq!(
            prior.check(4, |_| true),
            Err(Error::PriorLength {
                given: 2,
                expected: 4
            })
        );
    }
}
