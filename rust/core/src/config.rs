//! Settings of the search.

use crate::error::{Error, Result};

/// More layers than any model has.
pub const MAX_LAYERS: usize = 4096;
/// Rewards and penalties beyond this are refused, so that no sum overflows.
pub const MAX_MAGNITUDE: f64 = 1e100;
/// Most evaluations of a tree.
pub const MAX_EVALUATIONS: u32 = 1_000_000;
/// Most plans of a round.
pub const MAX_ROUND: u32 = 4096;
/// Bound of the dimensionless settings.
const MAX_FACTOR: f64 = 1e6;

/// How a descent chooses among the children of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// The upper confidence bound of a posterior over edits and pairs of edits, see [`Forest`](crate::Forest).
    Posterior,
    /// Mean value below the child plus a bonus that its prior shares out.
    Puct,
    /// The rule of Dr.LLM (arXiv 2510.12773): mean reward, a UCT bonus, minus the weighted depth of the child.
    DrLlm,
}

/// Settings of the search; [`SearchConfig::check`] says what is allowed.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchConfig {
    /// Plans evaluated for each tree, the identity included; what the probe evaluates is not counted.
    pub max_evaluations: u32,
    /// What a depth of 1 costs, in units of reward: value = reward - `depth_penalty` * depth.
    pub depth_penalty: f64,
    /// Weight of the exploration bonus; standard deviations under [`Selection::Posterior`].
    pub exploration: f64,
    /// Rule of descent.
    pub selection: Selection,
    /// Layers that stay at EXECUTE.
    pub protect: Vec<u32>,
    /// Largest depth of a plan, at least 1.
    pub max_depth: f64,
    /// Most REPEATs in a plan.
    pub max_repeats: u32,
    /// Most layers of a plan that are not EXECUTE.
    pub max_edits: u32,
    /// How far an open ticket lowers the score of the plans on its path, in units of the tree's spread.
    pub virtual_loss: f64,
    /// Trees that open with every single edit, if no prior is given.
    pub probe_trees: u32,
    /// Plans of one tree that are asked before any of them is told.
    pub round_size: u32,
    /// Flatness of the prior probabilities, in units of the prior's spread.
    pub temperature: f64,
    /// How many of a tree's own measurements of an edit the prior counts for.
    pub prior_weight: f64,
    /// Chance that a step of a descent takes any child rather than the best.
    pub random_child: f64,
    /// Variance of the interaction of two edits, in units of the mean variance of an effect.
    pub interaction: f64,
    /// Variance of a reward around the model of edits and pairs, in the same units.
    pub noise: f64,
    /// A tree stops when no plan that it finds promises more than its best one at so many standard deviations;
    /// 0: it never stops early.
    pub stop_at: f64,
}

impl Default for SearchConfig {
    fn default() -> Self {
        Self {
            max_evaluations: 24,
            depth_penalty: 1.0,
            exploration: 5.0,
            selection: Selection::Posterior,
            protect: Vec::new(),
            max_depth: 1.0,
            max_repeats: 2,
            max_edits: 12,
            virtual_loss: 0.03,
            probe_trees: 16,
            round_size: 4,
            temperature: 4.0,
            prior_weight: 0.5,
            random_child: 0.0,
            interaction: 0.1,
            noise: 0.01,
            stop_at: 0.0,
        }
    }
}

impl SearchConfig {
    /// Checks the settings against a number of layers.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] names the setting, its value and what was expected.
    pub fn check(&self, num_layers: usize) -> Result<()> {
        if !(1..=MAX_LAYERS).contains(&num_layers) {
            return Err(setting(
                "num_layers",
                &num_layers,
                &format!("1 to {MAX_LAYERS}"),
            ));
        }
        for (name, value, most) in [
            ("max_evaluations", self.max_evaluations, MAX_EVALUATIONS),
            ("round_size", self.round_size, MAX_ROUND),
        ] {
            if !(1..=most).contains(&value) {
                return Err(setting(name, &value, &format!("1 to {most}")));
            }
        }
        let finite = [
            ("depth_penalty", self.depth_penalty, MAX_MAGNITUDE),
            ("exploration", self.exploration, MAX_FACTOR),
            ("virtual_loss", self.virtual_loss, MAX_FACTOR),
            ("prior_weight", self.prior_weight, MAX_FACTOR),
            ("interaction", self.interaction, MAX_FACTOR),
            ("stop_at", self.stop_at, MAX_FACTOR),
        ];
        for (name, value, most) in finite {
            if !(0.0..=most).contains(&value) {
                return Err(setting(name, &value, &format!("0 to {most:e}")));
            }
        }
        if !(1.0..=2.0).contains(&self.max_depth) {
            let expected = "1 (the base model's depth) to 2 (every layer repeated); \
                            depth_penalty makes plans shorter";
            return Err(setting("max_depth", &self.max_depth, expected));
        }
        if !(1e-3..=MAX_FACTOR).contains(&self.temperature) {
            return Err(setting(
                "temperature",
                &self.temperature,
                &format!("1e-3 to {MAX_FACTOR:e}"),
            ));
        }
        if !(1e-6..=MAX_FACTOR).contains(&self.noise) {
            let expected = format!("1e-6 to {MAX_FACTOR:e}");
            return Err(setting("noise", &self.noise, &expected));
        }
        if !(0.0..=1.0).contains(&self.random_child) {
            return Err(setting(
                "random_child",
                &self.random_child,
                "a chance of 0 to 1",
            ));
        }
        for &layer in &self.protect {
            if layer as usize >= num_layers {
                let expected = format!("layers below {num_layers}");
                return Err(setting("protect", &layer, &expected));
            }
        }
        Ok(())
    }
}

fn setting(name: &'static str, given: &impl ToString, expected: &str) -> Error {
    Error::Setting {
        name,
        given: given.to_string(),
        expected: expected.to_owned(),
    }
}

/// Whether a number is finite and not absurdly large.
pub(crate) fn is_usable(number: f64) -> bool {
    number.abs() <= MAX_MAGNITUDE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_pass() {
        assert_eq!(SearchConfig::default().check(28), Ok(()));
    }

    #[test]
    fn each_setting_is_checked() {
        let base = SearchConfig::default;
        let wrong = [
            SearchConfig {
                max_evaluations: 0,
                ..base()
            },
            SearchConfig {
                round_size: 0,
                ..base()
            },
            SearchConfig {
                depth_penalty: f64::NAN,
                ..base()
            },
            SearchConfig {
                exploration: -1.0,
                ..base()
            },
            SearchConfig {
                virtual_loss: f64::INFINITY,
                ..base()
            },
            SearchConfig {
                max_depth: 0.9,
                ..base()
            },
            SearchConfig {
                max_depth: f64::NAN,
                ..base()
            },
            SearchConfig {
                temperature: 0.0,
                ..base()
            },
            SearchConfig {
                random_child: 1.5,
                ..base()
            },
            SearchConfig {
                interaction: -0.1,
                ..base()
            },
            SearchConfig {
                noise: 0.0,
                ..base()
            },
            SearchConfig {
                stop_at: f64::NAN,
                ..base()
            },
            SearchConfig {
                protect: vec![1, 28],
                ..base()
            },
        ];
        for config in wrong {
            assert!(
                matches!(config.check(28), Err(Error::Setting { .. })),
                "{config:?}"
            );
        }
        assert!(base().check(0).is_err());
        assert!(base().check(MAX_LAYERS + 1).is_err());
    }

    #[test]
    fn the_error_says_what_to_do() {
        let config = SearchConfig {
            protect: vec![9],
            ..SearchConfig::default()
        };
        let message = config.check(4).map_err(|error| error.to_string());
        assert_eq!(
            message,
            Err("the setting protect is 9; expected layers below 4".to_owned())
        );
    }
}
