use std::sync::Arc;

use pacs_order::{DrawOrder, DrawPlan};
use pacs_spec::EvaluationSet;

use crate::LoadReport;

/// A question with its reference answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The question as the source has it, without suffix.
    pub question: String,
    /// The reference answer.
    pub answer: String,
    /// The verifier that its row or its set names; none where the job's grades it.
    pub verifier: Option<Arc<str>>,
    /// Token ids of the whole prompt, up to where the model's answer begins.
    pub prompt_tokens: Vec<u32>,
}

impl Problem {
    /// Says which problem this is by its content: what is asked, what is right, and what the model sees. 32 hexadecimal digits.
    ///
    /// The prompt counts, for an edited chat template makes another problem of the same question.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        // Lengths keep the end of one text apart from the beginning of the next.
        for text in [&self.question, &self.answer] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        // Problems that name none are what they were before there were names.
        if let Some(verifier) = &self.verifier {
            hasher.update(&(verifier.len() as u64).to_le_bytes());
            hasher.update(verifier.as_bytes());
        }
        for token in &self.prompt_tokens {
            hasher.update(&token.to_le_bytes());
        }
        hasher.finalize().as_bytes()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A set of held-out problems.
#[derive(Debug)]
pub struct MeasuredSet {
    /// How this set is sampled and graded.
    pub set: EvaluationSet,
    /// Its problems in the order of their source; never empty.
    pub problems: Vec<Problem>,
}

/// All problems of a job.
#[derive(Debug)]
pub struct Problems {
    /// Those that are trained on, set by set in the order of the spec, each in the order of its source; empty only when the job
    /// does nothing but evaluate.
    pub train: Vec<Problem>,
    /// The held-out ones, by the sets of [`pacs_spec::JobSpec::evaluation_sets`]; empty when the job does not evaluate.
    pub sets: Vec<MeasuredSet>,
    /// What was read and what was left out.
    pub report: LoadReport,
    pub(crate) order: DrawOrder,
}

impl Problems {
    /// The training problem at `cursor`, the number of prompts that were drawn before.
    ///
    /// The answer depends on the cursor, the seed, the problems and the weights of their sets alone, so a job resumes where
    /// it was by remembering the cursor (see [`DrawOrder`]).
    #[must_use]
    pub fn train_at(&self, cursor: u64) -> &Problem {
        &self.train[self.order.index_at(cursor)]
    }

    /// The set of the held-out problem with this number among those of all sets, and its position there.
    #[must_use]
    pub fn measured(&self, number: u64) -> Option<(&MeasuredSet, usize)> {
        let within = |measured: &MeasuredSet| measured.set.position(number).filter(|at| *at < measured.problems.len());
        self.sets.iter().find_map(|measured| Some((measured, within(measured)?)))
    }

    /// What the order of draws depends on.
    #[must_use]
    pub fn plan(&self) -> &DrawPlan {
        self.order.plan()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_of_all_that_a_problem_says() {
        let problem = |question: &str, answer: &str, prompt: &[u32]| {
            let (question, answer) = (question.to_owned(), answer.to_owned());
            Problem { question, answer, verifier: None, prompt_tokens: prompt.to_vec() }.digest()
        };
        let one = problem("ab", "c", &[1, 2]);
        assert_eq!(one, problem("ab", "c", &[1, 2]));
        assert!(one.len() == 32 && one.chars().all(|c| c.is_ascii_hexdigit()), "{one}");
        for other in [problem("a", "bc", &[1, 2]), problem("ab", "d", &[1, 2]), problem("ab", "c", &[1, 3])] {
            assert_ne!(one, other);
        }
    }
}
