//! What a forest is made from.

use crate::config::SearchConfig;
use crate::edits::Limits;
use crate::error::{Error, Result};
use crate::prior::EditPrior;

/// What a forest is made from; the rest of its state follows from the rewards told.
#[derive(Debug, Clone, PartialEq)]
pub struct ForestSpec {
    /// Decoder layers of the model.
    pub num_layers: usize,
    /// Settings of the search.
    pub config: SearchConfig,
    /// Seed of the probe's choice of trees and of random children.
    pub seed: u64,
    /// One key for each tree: what is random about a tree follows from the seed and its key alone.
    pub tree_keys: Vec<u64>,
    /// What is known of single edits; without it, the forest opens with a probe.
    pub prior: Option<EditPrior>,
}

impl ForestSpec {
    /// Checks the trees and the prior; the settings have been checked, since `limits` is made from them.
    pub(crate) fn check(&self, limits: &Limits) -> Result<()> {
        if self.tree_keys.is_empty() || u32::try_from(self.tree_keys.len()).is_err() {
            return Err(Error::NumTrees {
                given: self.tree_keys.len(),
            });
        }
        match &self.prior {
            Some(prior) => prior.check(limits.num_edits(), |edit| limits.reaches(edit)),
            None => Ok(()),
        }
    }
}
