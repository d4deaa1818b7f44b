//! The forest: one tree for each prompt, driven by `ask` and `tell`.

use std::collections::BTreeSet;

use crate::config::is_usable;
use crate::edits::{Guide, Limits};
use crate::error::{Error, Result};
use crate::prior::EditPrior;
use crate::probe;
use crate::results::{self, BestPlan, Evaluated};
use crate::rng::SplitMix64;
use crate::spec::ForestSpec;
use crate::tree::{Shared, Tree};

/// Plans to evaluate: row `i` is a plan of tree `tree[i]`, whose reward goes with `ticket[i]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AskBatch {
    /// Tree of each plan, ascending.
    pub tree: Vec<u32>,
    /// Plans, row after row, `num_layers` actions each.
    pub plans: Vec<u8>,
    /// Ticket of each plan.
    pub ticket: Vec<u64>,
}

/// A search over plans for many prompts at once.
///
/// Each tree starts from the identity plan. A node is a set of edits; its children are all sets with one edit more
/// that keep the caps, so every legal plan can be reached, no plan is its own descendant, and taking an edit back is
/// another branch. Orders of the same edits meet in one node.
///
/// Under [`Selection::Posterior`](crate::Selection::Posterior) each tree has a Gaussian posterior over the effects of
/// edits and of pairs of edits, its prior that of the probe; how strong pairs and noise are is what makes the gains told
/// likeliest. A descent from the identity plan takes the child of highest `mean + exploration * deviation` while that
/// rises; of all the children on its way, the best that has not been asked is asked. For every second plan the deviation
/// counts a fifth, and plans beside the best one told are looked at too: one edit more, one fewer, or another in its
/// place. If `stop_at` is above 0, a tree stops early when no plan that it finds like this promises more than the best
/// one told, at `stop_at` deviations.
///
/// Under the other rules a descent takes the child of highest score, until it meets a plan that has not been asked. Under [`Selection::Puct`](crate::Selection::Puct) the score is `Q + c * unit * P * sqrt(N) / (1 + n)`:
///
/// * `Q` is the mean value of the told descents through the child, whichever parent they came by. A child that has not
///   been asked has its parent's own value plus what its edit is expected to change; that is the mean of what the edit
///   has changed in this tree, the prior counting as `prior_weight` such changes. An open ticket lowers `Q` by
///   `virtual_loss * unit`, weighted with its share of the child's descents.
/// * `P` is the softmax over the legal edits of the prior's effects, at `temperature` times their median size.
/// * `N` counts descents through the parent, `n` those along the edge; open ones count.
/// * `unit` is the median distance of the tree's told plans from the identity plan, in value.
///
/// A tree chooses `round_size` plans at once and learns from them together, in the order chosen, when the last one is
/// told. So what it asks follows from its own rewards, the settings, the prior, the seed and its key alone.
///
/// # Examples
///
/// ```
/// use dynadepth_core::{Forest, ForestSpec, SearchConfig};
///
/// let config = SearchConfig { max_evaluations: 8, probe_trees: 0, ..SearchConfig::default() };
/// let spec = ForestSpec { num_layers: 3, config, seed: 0, tree_keys: vec![0, 1], prior: None };
/// let mut forest = Forest::new(spec)?;
/// while !forest.is_finished() {
///     let batch = forest.ask(256)?;
///     // Here a model would judge the plans; let every layer but the first be useless.
///     let rewards: Vec<f64> = batch.plans.chunks(3).map(|plan| f64::from(plan[0].min(1))).collect();
///     forest.tell(&batch.ticket, &rewards)?;
/// }
/// assert_eq!(forest.best(1)?.plan, [1, 0, 0]);
/// # Ok::<(), dynadepth_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Forest {
    spec: ForestSpec,
    limits: Limits,
    /// Trees that open with the probe, ascending.
    probed: Vec<usize>,
    /// What the search goes by; `None` while the probe runs.
    guide: Option<Guide>,
    /// The prior given or measured.
    prior: Option<EditPrior>,
    trees: Vec<Tree>,
    /// Tree whose turn it is when a batch cannot serve all.
    turn: usize,
}

impl Forest {
    /// Makes a forest.
    ///
    /// With a prior, or with `probe_trees = 0`, the search starts at once. Else the identity plan and every single
    /// edit that some legal plan contains are asked first, on up to `probe_trees` trees that the seed chooses, and
    /// their mean effects become the prior.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`], [`Error::NumTrees`], [`Error::PriorLength`] or [`Error::PriorMissing`].
    pub fn new(spec: ForestSpec) -> Result<Self> {
        spec.config.check(spec.num_layers)?;
        let limits = Limits::new(spec.num_layers, &spec.config);
        spec.check(&limits)?;
        let probed = if spec.prior.is_some() {
            Vec::new()
        } else {
            probe::choose_trees(&spec)
        };
        let tree = |&key: &u64| Tree::new(spec.num_layers, SplitMix64::keyed(spec.seed, key));
        let mut forest = Self {
            trees: spec.tree_keys.iter().map(tree).collect(),
            prior: spec.prior.clone(),
            guide: None,
            limits,
            probed,
            turn: 0,
            spec,
        };
        if forest.probed.is_empty() {
            forest.start_search();
        } else {
            let edits = probe::edits(&forest.limits);
            let (shared, trees) = split(&forest.spec, &forest.limits, &mut forest.trees);
            for &tree in &forest.probed {
                trees[tree].open_probe(&edits, &shared);
            }
        }
        Ok(forest)
    }

    /// Hands out up to `max_plans` plans, never one that has been handed out before.
    ///
    /// Trees that have plans waiting get equally many, give or take one; when there is not one for each, they take
    /// turns. An empty batch means that all trees are finished or wait for tells.
    ///
    /// # Errors
    ///
    /// [`Error::MaxPlans`] if `max_plans` is 0.
    ///
    /// # Complexity
    ///
    /// O(trees + plans handed out); the search itself runs in [`Forest::tell`].
    pub fn ask(&mut self, max_plans: usize) -> Result<AskBatch> {
        if max_plans == 0 {
            return Err(Error::MaxPlans);
        }
        let mut share = vec![0_usize; self.trees.len()];
        let mut left = max_plans;
        let num_trees = self.trees.len();
        let turns = (self.turn..num_trees).chain(0..self.turn);
        let mut waiting: Vec<usize> = turns
            .filter(|&tree| self.trees[tree].waiting() > 0)
            .collect();
        while left > 0 && !waiting.is_empty() {
            for &tree in waiting.iter().take(left) {
                share[tree] += 1;
                self.turn = (tree + 1) % num_trees;
            }
            left = left.saturating_sub(waiting.len());
            waiting.retain(|&tree| share[tree] < self.trees[tree].waiting());
        }
        let mut batch = AskBatch::default();
        for (index, (tree, count)) in self.trees.iter_mut().zip(share).enumerate() {
            for _ in 0..count {
                batch.tree.push(number(index));
                batch
                    .plans
                    .extend_from_slice(&tree.evaluations[tree.issued].plan);
                batch.ticket.push(ticket(index, tree.issued));
                tree.issued += 1;
            }
        }
        Ok(batch)
    }

    /// Notes rewards. Either all of them, or on an error none.
    ///
    /// # Errors
    ///
    /// [`Error::RewardsLength`], [`Error::BadReward`], [`Error::UnknownTicket`] or [`Error::ReusedTicket`].
    ///
    /// # Complexity
    ///
    /// O(layers x edits of a plan) for each plan of the rounds that this completes.
    pub fn tell(&mut self, tickets: &[u64], rewards: &[f64]) -> Result<()> {
        if tickets.len() != rewards.len() {
            return Err(Error::RewardsLength {
                given: rewards.len(),
                expected: tickets.len(),
            });
        }
        let mut seen = BTreeSet::new();
        for (&ticket, &reward) in tickets.iter().zip(rewards) {
            if !is_usable(reward) {
                return Err(Error::BadReward { ticket, reward });
            }
            let (tree, index) = place(ticket);
            let Some(tree) = self.trees.get(tree).filter(|tree| index < tree.issued) else {
                return Err(Error::UnknownTicket { ticket });
            };
            if tree.evaluations[index].reward.is_some() || !seen.insert(ticket) {
                return Err(Error::ReusedTicket { ticket });
            }
        }
        let mut touched = BTreeSet::new();
        for (&ticket, &reward) in tickets.iter().zip(rewards) {
            let (tree, index) = place(ticket);
            self.trees[tree].tell(index, reward);
            touched.insert(tree);
        }
        self.go_on(&touched);
        Ok(())
    }

    /// Whether every tree is finished.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.guide.is_some() && self.trees.iter().all(Tree::is_settled)
    }

    /// Whether a tree has nothing left to ask and nothing left to be told.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownTree`].
    pub fn tree_finished(&self, tree: usize) -> Result<bool> {
        Ok(self.tree(tree)?.is_settled() && self.guide.is_some())
    }

    /// Returns the evaluated plan of highest value within the caps; ties go to the lower depth, then to the lower
    /// plan.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownTree`], or [`Error::NothingEvaluated`] before the tree's first tell.
    pub fn best(&self, tree: usize) -> Result<BestPlan> {
        results::best(&self.tree(tree)?.evaluations, &self.spec.config)
            .ok_or(Error::NothingEvaluated { tree })
    }

    /// Returns the evaluated plans within the caps that no other one beats in both depth and reward, by ascending
    /// depth.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownTree`].
    pub fn pareto(&self, tree: usize) -> Result<Vec<BestPlan>> {
        Ok(results::pareto(
            &self.tree(tree)?.evaluations,
            &self.spec.config,
        ))
    }

    /// Returns all told plans of a tree in the order in which they were chosen, the probe's included.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownTree`].
    pub fn evaluated(&self, tree: usize) -> Result<Evaluated> {
        Ok(results::evaluated(&self.tree(tree)?.evaluations))
    }

    /// Returns the prior: the one given, or the one that the probe measured.
    ///
    /// # Errors
    ///
    /// [`Error::NoPrior`] while the probe runs, or if there is no probe.
    pub fn prior(&self) -> Result<&EditPrior> {
        self.prior.as_ref().ok_or(Error::NoPrior)
    }

    /// What the forest was made from.
    #[must_use]
    pub fn spec(&self) -> &ForestSpec {
        &self.spec
    }

    /// Number of trees.
    #[must_use]
    pub fn num_trees(&self) -> usize {
        self.trees.len()
    }

    /// Lets the trees that have just been told go on, if their round is complete.
    fn go_on(&mut self, touched: &BTreeSet<usize>) {
        let Some(guide) = &self.guide else {
            if self
                .probed
                .iter()
                .all(|&tree| self.trees[tree].is_settled())
            {
                self.finish_probe();
            }
            return;
        };
        let (shared, trees) = split(&self.spec, &self.limits, &mut self.trees);
        for &tree in touched {
            let tree = &mut trees[tree];
            if tree.is_settled() {
                tree.learn(guide, &shared);
                tree.choose_round(guide, &shared);
            }
        }
    }

    fn finish_probe(&mut self) {
        let changes: Vec<Vec<Option<f64>>> = self
            .probed
            .iter()
            .map(|&tree| probe::changes(&self.trees[tree].evaluations, &self.limits))
            .collect();
        self.prior = Some(EditPrior::from_changes(&changes, self.limits.num_edits()));
        self.start_search();
    }

    fn start_search(&mut self) {
        let guide = Guide::new(&self.limits, &self.spec.config, self.prior.as_ref());
        let (shared, trees) = split(&self.spec, &self.limits, &mut self.trees);
        for tree in trees {
            if tree.evaluations.is_empty() {
                tree.open_search(&shared);
            } else {
                tree.learn(&guide, &shared);
                tree.choose_round(&guide, &shared);
            }
        }
        self.guide = Some(guide);
    }

    fn tree(&self, tree: usize) -> Result<&Tree> {
        self.trees.get(tree).ok_or(Error::UnknownTree {
            tree,
            num_trees: self.trees.len(),
        })
    }
}

fn split<'a>(
    spec: &'a ForestSpec,
    limits: &'a Limits,
    trees: &'a mut [Tree],
) -> (Shared<'a>, &'a mut [Tree]) {
    (
        Shared {
            config: &spec.config,
            limits,
            num_layers: spec.num_layers,
        },
        trees,
    )
}

/// A ticket names a tree and one of its evaluations.
fn ticket(tree: usize, index: usize) -> u64 {
    (u64::from(number(tree)) << 32) | u64::from(number(index))
}

#[allow(clippy::cast_possible_truncation)] // each half has 32 bits
fn place(ticket: u64) -> (usize, usize) {
    (
        (ticket >> 32) as usize,
        (ticket & u64::from(u32::MAX)) as usize,
    )
}

/// Both trees and evaluations are counted in 32 bits, so nothing is cut off here.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}
