//! A descent by the posterior: from the identity plan, one edit after the other, to the best plan not asked yet.

use std::collections::HashSet;

use crate::config::SearchConfig;
use crate::edits::{target, Guide, Limits, Usage};
use crate::plan::{identity, EXECUTE};
use crate::posterior::{Belief, Posterior};
use crate::rng::SplitMix64;

/// Factors of the settings' interaction and noise: some prompts are additive, some are not, and the gains tell.
const LADDER: [(f64, f64); 4] = [(1.0, 1.0), (0.0, 1.0), (1.0, 20.0), (0.0, 20.0)];

/// How far a descent that looks closely is led by what is unknown, against one that explores.
const CLOSELY: f64 = 0.2;

/// A plan that could be asked next.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) plan: Box<[u8]>,
    score: f64,
}

/// The plans of a tree that searches by its posterior.
#[derive(Debug, Clone)]
pub(crate) struct Climber {
    /// The same posterior under other variances of interactions and noise, see `LADDER`.
    models: Vec<Posterior>,
    /// The model under which the gains told are likeliest.
    likeliest: usize,
    /// Plans asked. Only looked up, never iterated.
    asked: HashSet<Box<[u8]>>,
    /// The same that keep the caps, in the order asked.
    within: Vec<Box<[u8]>>,
    /// The first of these that may have a child that was not asked.
    open: usize,
    /// Most gain told, and the plan that has it.
    best: f64,
    best_plan: Box<[u8]>,
}

/// Where a descent stands.
struct Place {
    plan: Box<[u8]>,
    usage: Usage,
    belief: Belief,
}

impl Climber {
    pub(crate) fn new(guide: &Guide, config: &SearchConfig) -> Self {
        let model = |&(interaction, noise): &(f64, f64)| {
            Posterior::new(
                guide,
                config.interaction * interaction,
                config.noise * noise,
            )
        };
        Self {
            models: LADDER.iter().map(model).collect(),
            likeliest: 0,
            asked: HashSet::new(),
            within: Vec::new(),
            open: 0,
            best: 0.0,
            best_plan: identity(guide.effect.len() / 2).into(),
        }
    }

    fn posterior(&self) -> &Posterior {
        &self.models[self.likeliest]
    }

    /// Notes a plan that is asked.
    pub(crate) fn add(&mut self, plan: &[u8], guide: &Guide, limits: &Limits) {
        for model in &mut self.models {
            model.add(plan, guide);
        }
        self.asked.insert(plan.into());
        if limits.admits(plan) {
            self.within.push(plan.into());
        }
    }

    /// Learns the gains over the identity of the plans that were added after those told before, in their order.
    pub(crate) fn tell(&mut self, told: &[(f64, bool, &[u8])], guide: &Guide) {
        for &(gain, admitted, plan) in told {
            if admitted && gain > self.best {
                self.best = gain;
                self.best_plan = plan.into();
            }
        }
        let mut most = f64::NEG_INFINITY;
        for (index, model) in self.models.iter_mut().enumerate() {
            model.tell(told.iter().map(|&(gain, ..)| gain), guide);
            let evidence = model.evidence(guide);
            if evidence > most {
                most = evidence;
                self.likeliest = index;
            }
        }
    }

    /// Whether no plan that a descent meets promises more than the best one told, at `stop_at` deviations.
    pub(crate) fn is_done(&self, guide: &Guide, limits: &Limits, config: &SearchConfig) -> bool {
        let weight = config.stop_at;
        let found = better(
            self.descend(weight, guide, limits, None),
            self.beside_best(weight, guide, limits),
        );
        found.is_none_or(|found| found.score <= self.best)
    }

    /// Finds the plan to ask next; `None` if all have been asked.
    pub(crate) fn next(
        &mut self,
        guide: &Guide,
        limits: &Limits,
        config: &SearchConfig,
        rng: &mut SplitMix64,
    ) -> Option<Candidate> {
        // Every second plan is chosen for what it gains rather than for what it might.
        let closely = self.asked.len() % 2 == 0;
        let weight = if closely {
            config.exploration * CLOSELY
        } else {
            config.exploration
        };
        let chance = (config.random_child > 0.0).then_some((config.random_child, rng));
        let mut found = self.descend(weight, guide, limits, chance);
        if closely {
            found = better(found, self.beside_best(weight, guide, limits));
        }
        if found.is_some() {
            return found;
        }
        // Every legal plan is a legal child of another one, so one that is left is a child of one that was asked.
        while self.open < self.within.len() {
            let place = self.place(&self.within[self.open].clone(), guide);
            let (fresh, _) = self.children(&place, weight, guide, limits);
            if fresh.is_some() {
                return fresh;
            }
            self.open += 1;
        }
        None
    }

    /// Returns the best plan that has not been asked among those beside the best plan told: one edit fewer, or one
    /// edit more, or one in place of another.
    fn beside_best(&self, weight: f64, guide: &Guide, limits: &Limits) -> Option<Candidate> {
        let whole = self.place(&self.best_plan, guide);
        let (mut found, _) = self.children(&whole, weight, guide, limits);
        for layer in (0..self.best_plan.len()).filter(|&layer| self.best_plan[layer] != EXECUTE) {
            let mut plan = self.best_plan.clone();
            plan[layer] = EXECUTE;
            if !limits.admits(&plan) {
                continue;
            }
            let place = self.place(&plan, guide);
            if !self.asked.contains(&plan) {
                let (mean, deviation) = self.posterior().belief(&place.belief);
                let score = mean + weight * deviation;
                found = better(found, Some(Candidate { plan, score }));
            }
            found = better(found, self.children(&place, weight, guide, limits).0);
        }
        found
    }

    /// Goes to the best child while that raises the score, or by chance to any; returns the best plan met that has not
    /// been asked.
    fn descend(
        &self,
        weight: f64,
        guide: &Guide,
        limits: &Limits,
        mut chance: Option<(f64, &mut SplitMix64)>,
    ) -> Option<Candidate> {
        let mut place = self.place(&identity(limits.num_edits() / 2), guide);
        let mut reached = f64::NEG_INFINITY;
        let mut found: Option<Candidate> = None;
        loop {
            if let Some((chance, rng)) = &mut chance {
                if rng.unit() < *chance {
                    let edits: Vec<usize> = (0..limits.num_edits())
                        .filter(|&edit| limits.allows(&place.plan, place.usage, edit))
                        .collect();
                    if edits.is_empty() {
                        return found;
                    }
                    let edit = edits[rng.below(edits.len())];
                    let candidate = self.candidate(&place, edit, weight, guide);
                    if !self.asked.contains(&candidate.plan) {
                        return Some(candidate);
                    }
                    reached = candidate.score;
                    self.go(&mut place, edit, guide);
                    continue;
                }
            }
            let (fresh, best) = self.children(&place, weight, guide, limits);
            found = better(found, fresh);
            match best {
                Some((edit, score)) if score > reached => {
                    reached = score;
                    self.go(&mut place, edit, guide);
                }
                _ => return found,
            }
        }
    }

    /// Returns the best child that has not been asked, and the edit and score of the best child of all.
    fn children(
        &self,
        place: &Place,
        weight: f64,
        guide: &Guide,
        limits: &Limits,
    ) -> (Option<Candidate>, Option<(usize, f64)>) {
        let mut scored = Vec::new();
        for edit in 0..limits.num_edits() {
            if limits.allows(&place.plan, place.usage, edit) {
                let (mean, deviation) = self.posterior().child(&place.belief, edit, guide);
                scored.push((mean + weight * deviation, edit));
            }
        }
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let best = scored.first().map(|&(score, edit)| (edit, score));
        let fresh = scored
            .iter()
            .map(|&(_, edit)| self.candidate(place, edit, weight, guide))
            .find(|candidate| !self.asked.contains(&candidate.plan));
        (fresh, best)
    }

    fn candidate(&self, place: &Place, edit: usize, weight: f64, guide: &Guide) -> Candidate {
        let (mean, deviation) = self.posterior().child(&place.belief, edit, guide);
        let (layer, action) = target(edit, place.plan.len());
        let mut plan = place.plan.clone();
        plan[layer] = action;
        Candidate {
            plan,
            score: mean + weight * deviation,
        }
    }

    fn place(&self, plan: &[u8], guide: &Guide) -> Place {
        let mut belief = self.posterior().identity();
        for edit in crate::edits::edits_of(plan) {
            self.posterior().step(&mut belief, edit, guide);
        }
        Place {
            plan: plan.into(),
            usage: Usage::of(plan),
            belief,
        }
    }

    fn go(&self, place: &mut Place, edit: usize, guide: &Guide) {
        self.posterior().step(&mut place.belief, edit, guide);
        let (layer, action) = target(edit, place.plan.len());
        place.plan[layer] = action;
        place.usage = Usage::of(&place.plan);
    }
}

/// Returns the candidate of higher score, the first among equals.
fn better(first: Option<Candidate>, second: Option<Candidate>) -> Option<Candidate> {
    match (first, second) {
        (Some(first), Some(second)) if second.score > first.score => Some(second),
        (None, second) => second,
        (first, _) => first,
    }
}
