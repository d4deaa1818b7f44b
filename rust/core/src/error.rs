//! Everything that can go wrong in this crate, one variant for each cause.

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// A failure, with what was given and what was expected.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// An action is not 0, 1 or 2.
    #[error("plan {row} has action {action} at layer {layer}; expected 0 (skip), 1 (execute) or 2 (repeat)")]
    UnknownAction {
        /// Row of the plan in the batch.
        row: usize,
        /// Layer of the action.
        layer: usize,
        /// The action given.
        action: u8,
    },
    /// A plan in which no layer runs.
    #[error("plan {row} skips all {num_layers} layers; at least one layer must run")]
    EmptyPlan {
        /// Row of the plan in the batch.
        row: usize,
        /// Layers of the plan.
        num_layers: usize,
    },
    /// A sweep of no plans, no prompts or no layers.
    #[error("a sweep needs at least one plan, one prompt and one layer; got {num_plans} plans, {num_examples} prompts, {num_layers} layers")]
    EmptySweep {
        /// Plans given.
        num_plans: usize,
        /// Prompts given.
        num_examples: usize,
        /// Layers of a plan.
        num_layers: usize,
    },
    /// The flat array of plans is not rows times layers.
    #[error("{given} actions were given for {num_plans} plans of {num_layers} layers; give one action for each layer of each plan")]
    PlansLength {
        /// Actions given.
        given: usize,
        /// Plans expected: one for each entry of `example`.
        num_plans: usize,
        /// Layers of a plan.
        num_layers: usize,
    },
    /// A plan belongs to a prompt that is not in the batch.
    #[error("plan {row} belongs to prompt {example}, but the batch has {num_examples} prompts; expected an index below {num_examples}")]
    UnknownExample {
        /// Row of the plan.
        row: usize,
        /// Prompt named.
        example: u32,
        /// Prompts in the batch.
        num_examples: usize,
    },
    /// More rows than a 32-bit index can name.
    #[error("{given} rows are too many for one sweep; split the batch, the limit is {limit}")]
    TooManyRows {
        /// Rows given.
        given: usize,
        /// Largest number allowed.
        limit: usize,
    },
    /// A setting of the search is out of range.
    #[error("the setting {name} is {given}; expected {expected}")]
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// Value given.
        given: String,
        /// What is allowed.
        expected: String,
    },
    /// No trees, or more than 32 bits count.
    #[error(
        "a forest of {given} trees cannot be made; expected 1 to {}, one for each prompt",
        u32::MAX
    )]
    NumTrees {
        /// Trees asked for.
        given: usize,
    },
    /// A prior for another number of layers.
    #[error(
        "the prior has {given} edits; expected {expected}: a skip and a repeat for each layer"
    )]
    PriorLength {
        /// Entries given.
        given: usize,
        /// Entries expected.
        expected: usize,
    },
    /// The search can reach an edit that the prior does not measure.
    #[error("the prior gives {mean} for the edit '{action} layer {layer}', which the search can reach; probe again with the same protect, max_repeats and max_edits, or protect the layer")]
    PriorMissing {
        /// `skip` or `repeat`.
        action: &'static str,
        /// Layer of the edit.
        layer: usize,
        /// Mean given.
        mean: f64,
    },
    /// A batch of no plans was asked for.
    #[error("max_plans is 0; ask for at least one plan")]
    MaxPlans,
    /// Not one reward for each ticket.
    #[error("{given} rewards were told for {expected} tickets; give one reward for each ticket")]
    RewardsLength {
        /// Rewards given.
        given: usize,
        /// Tickets given.
        expected: usize,
    },
    /// A reward is not a usable number.
    #[error("the reward of ticket {ticket} is {reward}; expected a finite number of at most 1e100 in size")]
    BadReward {
        /// Ticket told.
        ticket: u64,
        /// Reward given.
        reward: f64,
    },
    /// A ticket that was never handed out.
    #[error(
        "ticket {ticket} was never handed out by this forest; tell only tickets that ask returned"
    )]
    UnknownTicket {
        /// Ticket told.
        ticket: u64,
    },
    /// A ticket that has been told before, or twice in one call.
    #[error("ticket {ticket} is told more than once; each ticket takes one reward")]
    ReusedTicket {
        /// Ticket told.
        ticket: u64,
    },
    /// A tree that the forest does not have.
    #[error("tree {tree} does not exist; expected an index below {num_trees}")]
    UnknownTree {
        /// Tree named.
        tree: usize,
        /// Trees in the forest.
        num_trees: usize,
    },
    /// A result was asked for before any reward was told.
    #[error("tree {tree} has no evaluated plan yet; tell the reward of one first")]
    NothingEvaluated {
        /// Tree named.
        tree: usize,
    },
    /// The prior was asked for before the probe was told, or without one.
    #[error("there is no prior: tell the rewards of the whole probe first, or make the forest with probe_trees above 0 or with a prior")]
    NoPrior,
}
