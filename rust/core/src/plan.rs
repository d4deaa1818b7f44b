//! Plans: how many times each decoder layer runs for one prompt.
//!
//! A plan is a slice of `num_layers` actions, each the number of visits of its layer. The numbers are those of
//! `dynadepth.plans` in Python.

use crate::error::{Error, Result};

/// The layer does not run: its input goes on unchanged.
pub const SKIP: u8 = 0;
/// The layer runs once, as in the base model.
pub const EXECUTE: u8 = 1;
/// The layer runs twice, the second time on its own output.
pub const REPEAT: u8 = 2;

/// Returns the plan of the base model: every layer runs once.
#[must_use]
pub fn identity(num_layers: usize) -> Vec<u8> {
    vec![EXECUTE; num_layers]
}

/// Returns how many layer executions a plan asks for.
#[must_use]
pub fn visits(plan: &[u8]) -> u32 {
    plan.iter().map(|&action| u32::from(action)).sum()
}

/// Returns executed visits as a fraction of the number of layers; `1.0` is the base model.
///
/// # Examples
///
/// ```
/// assert_eq!(dynadepth_core::plan::depth(&[1, 0, 2, 0]).to_bits(), 0.75_f64.to_bits());
/// ```
#[must_use]
pub fn depth(plan: &[u8]) -> f64 {
    fraction(visits(plan), plan.len())
}

#[allow(clippy::cast_precision_loss)] // a model has far fewer than 2^52 layers
pub(crate) fn fraction(visits: u32, num_layers: usize) -> f64 {
    f64::from(visits) / num_layers as f64
}

/// Checks one plan; `row` names it in the error.
///
/// # Errors
///
/// [`Error::UnknownAction`] for an action above [`REPEAT`], [`Error::EmptyPlan`] if no layer runs.
pub fn check(plan: &[u8], row: usize) -> Result<()> {
    for (layer, &action) in plan.iter().enumerate() {
        if action > REPEAT {
            return Err(Error::UnknownAction { row, layer, action });
        }
    }
    if plan.iter().all(|&action| action == SKIP) {
        return Err(Error::EmptyPlan {
            row,
            num_layers: plan.len(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_has_depth_one() {
        assert_eq!(visits(&identity(7)), 7);
        assert_eq!(depth(&identity(7)).to_bits(), 1.0_f64.to_bits());
    }

    #[test]
    fn check_names_row_and_layer() {
        assert_eq!(
            check(&[1, 3], 4),
            Err(Error::UnknownAction {
                row: 4,
                layer: 1,
                action: 3
            })
        );
        assert_eq!(
            check(&[0, 0], 2),
            Err(Error::EmptyPlan {
                row: 2,
                num_layers: 2
            })
        );
        assert_eq!(check(&[0, 2], 0), Ok(()));
    }
}
