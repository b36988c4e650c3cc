use crate::ObjectiveError;

/// Facts about an answer that every rank knows before the forward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SequenceInfo {
    /// Group of the answer; its members may sit anywhere in a slice.
    pub group: u64,
    /// Verifiable outcome, in `[0, 1]`; PACS trains on it.
    pub label: f64,
    /// Reward; every other objective trains on it.
    pub reward: f64,
    /// Reward of the greedy answer to the same prompt; read by ReMax only.
    pub greedy_reward: Option<f64>,
    /// Number of answer tokens; above 0.
    pub tokens: u32,
    /// Whether the answer ended at the length limit.
    pub truncated: bool,
}

/// Per-token numbers of one answer; each slice is as long as [`SequenceInfo::tokens`].
///
/// There is no padding and no mask: a token that does not count is not passed, so it cannot influence anything.
/// Log-probs are in nats, at the temperature of sampling.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenData<'a> {
    /// Log-probs under the policy being trained. Read in updates, not at the start of a step.
    pub new: &'a [f64],
    /// Log-probs, by the learner, under the policy in the ratio's denominator: that at the start of the step, or for
    /// PACS that at the last reference reset.
    pub old: &'a [f64],
    /// Log-probs under the distribution that the tokens were drawn from, by the rollout engine; importance weights read
    /// them. With top-k, top-p or min-p they exceed those of the temperature-scaled policy.
    pub rollout: Option<&'a [f64]>,
    /// Log-probs under the frozen reference policy, for a KL penalty.
    pub reference: Option<&'a [f64]>,
    /// Entropies of the policy being trained, for the value of an entropy bonus.
    pub entropies: Option<&'a [f64]>,
    /// Value estimates of the return before each token, at the start of the step.
    pub values: Option<&'a [f64]>,
    /// Value estimates of the model being trained.
    pub new_values: Option<&'a [f64]>,
}

/// An answer with everything that objectives read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer<'a> {
    /// Facts that every rank knows.
    pub info: SequenceInfo,
    /// Numbers that only the rank with the answer's tokens has.
    pub tokens: TokenData<'a>,
}

/// An answer with its position in the caller's slice, for error messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed<'a> {
    pub(crate) index: usize,
    pub(crate) info: &'a SequenceInfo,
    pub(crate) tokens: &'a TokenData<'a>,
}

impl<'a> Placed<'a> {
    pub(crate) fn new(index: usize, info: &'a SequenceInfo, tokens: &'a TokenData<'a>) -> Self {
        Self { index, info, tokens }
    }

    pub(crate) fn new_logprobs(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("log-probs of the policy being trained", Some(self.tokens.new))
    }

    pub(crate) fn old_logprobs(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("old log-probs", Some(self.tokens.old))
    }

    pub(crate) fn rollout_logprobs(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("log-probs of the rollout engine", self.tokens.rollout)
    }

    pub(crate) fn reference_logprobs(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("log-probs of the reference policy", self.tokens.reference)
    }

    pub(crate) fn entropies(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("entropies", self.tokens.entropies)
    }

    pub(crate) fn values(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("values", self.tokens.values)
    }

    pub(crate) fn new_values(self) -> Result<&'a [f64], ObjectiveError> {
        self.checked("new values", self.tokens.new_values)
    }

    /// Checks that requested numbers are present, one per token, and finite.
    pub(crate) fn checked(self, what: &'static str, values: Option<&'a [f64]>) -> Result<&'a [f64], ObjectiveError> {
        let index = self.index;
        let group = self.info.group;
        let tokens = self.info.tokens as usize;
        let values = values.unwrap_or_default();
        if values.len() != tokens {
            return Err(ObjectiveError::Tokens { index, group, what, tokens, values: values.len() });
        }
        match values.iter().position(|value| !value.is_finite()) {
            Some(token) => Err(ObjectiveError::NotFinite { index, group, what, token, value: values[token] }),
            None => Ok(values),
        }
    }
}

/// Checks what every objective requires of its answers.
pub(crate) fn check_infos(infos: &[SequenceInfo]) -> Result<(), ObjectiveError> {
    if infos.is_empty() {
        return Err(ObjectiveError::NoSequences);
    }
    for (index, &SequenceInfo { group, reward, tokens, .. }) in infos.iter().enumerate() {
        if tokens == 0 {
            return Err(ObjectiveError::EmptyAnswer { index, group });
        }
        if !reward.is_finite() {
            return Err(ObjectiveError::Reward { index, group, reward });
        }
    }
    Ok(())
}
